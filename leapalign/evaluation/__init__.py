"""Pictures and what they are worth: sampling, scores, metrics. Nothing here trains."""
