"""The command line: thin, since all content comes from the registry, the planner and the engine."""
