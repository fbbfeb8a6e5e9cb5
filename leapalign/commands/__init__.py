"""The command line, one file a command. What a command does beyond arguments and output lies elsewhere."""
