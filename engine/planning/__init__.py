"""What a step would hold, move and take, and which way to run it. Nothing here runs a step."""
