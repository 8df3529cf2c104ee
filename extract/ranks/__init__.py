"""The processes of a job: their group, agreement, heartbeat, signals and machine."""
