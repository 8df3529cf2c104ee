"""Let a feed read windows of rasters in place of tiles."""

from typing import TYPE_CHECKING, NamedTuple

from extract.errors import RasterError

from .decode import RGBImage

if TYPE_CHECKING:  # GDAL takes a third of a second to import, and most feeds never see a raster
    from .raster import Raster, Window


class WindowRequest(NamedTuple):
    """One window: its row in the batch, its raster's file, and its place in the raster."""

    row: int
    path: str
    window: "Window"

    @property
    def tile(self) -> str:
        """A name such as `scenes/1052.tif#3_7`: grid row and column, as in the tiles that `extract tile` cuts."""
        return f"{self.path}#{self.window.row}_{self.window.column}"


class WindowReader:
    """Reads windows, with one raster open at a time; must be used by one thread only."""

    def __init__(self) -> None:
        self._path: str | None = None
        self._raster: Raster | None = None

    def read(self, request: WindowRequest) -> RGBImage:
        """Return the window's pixels, (height, width, 3) uint8 RGB.

        Raises:
            RasterError: the raster is damaged there, or shrank since its windows were laid out.
        """
        from .raster import Raster

        if self._raster is None or self._path != request.path:
            self.close()
            self._raster, self._path = Raster(request.path), request.path
        image, window = self._raster.read(request.window), request.window
        if image.shape[:2] != (window.height, window.width):  # GDAL silently clips a window at the raster's edge
            raise RasterError(f"{request.path} became smaller while it was read: run the same command again")
        return image

    def close(self) -> None:
        """Close the raster that is still open."""
        if self._raster is not None:
            self._raster.close()
        self._raster = None
