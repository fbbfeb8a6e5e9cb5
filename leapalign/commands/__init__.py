"""The command line, one file a command. What a command does beyond arguments and output lies elsewhere."""

# name -> its module: TEXT (what it does), OPTIONS ({name: arguments of argparse}), TAKES_CONFIG, run(options[, config])
COMMANDS = {name: f"leapalign.commands.{name}" for name in ("align", "plan", "sample", "evaluate", "embed", "doctor")}
