"""From a config to the memory plan of its run. How a plan is found is engine/planning."""
