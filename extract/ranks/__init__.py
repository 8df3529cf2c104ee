"""Coordinate the processes of a job: group, agreement, heartbeat, signals and machine."""
