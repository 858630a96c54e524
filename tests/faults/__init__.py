"""A campaign of faults: kills, power cuts, damage, full disks, odd input and long runs. `make faults` runs it."""
