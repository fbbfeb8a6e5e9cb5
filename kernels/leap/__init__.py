"""Leap prediction, connector distances and discounted cotangents. No models, no optimizer."""
