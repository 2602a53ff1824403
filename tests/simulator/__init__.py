"""Tests of the simulator (a package: its file names are also used in other rooms)."""
