"""How the packaged models were trained. Nothing of an alignment run imports it."""
