"""Small pretrained pipelines that ship with the package, so that every command runs without a download."""
