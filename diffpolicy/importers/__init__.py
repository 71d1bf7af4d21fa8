"""Other people's formats -> ReplayBuffer: one file and one line here for each. Zarr stores need none (replay.py opens them)."""

IMPORTERS: dict = {}
