"""Where bytes lie: host arena, block store, tensor files, free memory. Nothing that moves them or computes."""
