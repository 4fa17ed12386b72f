"""Training: settings, the one loop, checkpoints, and what is shown of it. Programs use it through ``trtkern.train``.

The loop has four seams. ``loader`` and ``reading`` make a batch, of what ``trtkern.data`` holds. ``step`` is what a
step does with it, by a loss of ``losses``, an optimiser of ``optimizers`` and the rate of ``schedules``. ``measure``
and ``tally`` say what is reached. ``keeping``, ``checkpoint`` and ``run`` write it down. ``loop.Trainer`` holds them.
"""
