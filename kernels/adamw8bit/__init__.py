"""The 8-bit AdamW step: its definition in torch, on the device in Triton, on the host in C++. No model, no store."""
