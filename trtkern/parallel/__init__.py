"""Training on several processes: who they are and what they tell one another, and a model in parts of theirs.

``job.py`` has the processes of ``torchrun``, and ``launch.py`` starts them; ``sharding.py`` hands a model to FSDP2, and
``parts.py`` has its tensors, whole or in parts.
"""
