"""Ways to compute the gradients of a task, one file each. No method and no reward is known here."""

# name -> where it is; loaded when it is asked for. A new one is a file, a line here, and a test beside the others'.
EXECUTORS = {
    "autograd": "leapalign.executors.autograd:autograd",
    "reference": "leapalign.executors.reference:reference",
    "streamed": "leapalign.executors.streamed:by_plan",
    "streamed-paired": "leapalign.executors.streamed:paired",
    "streamed-held": "leapalign.executors.streamed:held",
}
