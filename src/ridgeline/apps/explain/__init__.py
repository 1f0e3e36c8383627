"""Where a workload's time goes, how far that is from the machine's ceilings, and what to change."""
