"""Training on several processes: who they are and what they tell one another, and a model in parts of theirs.

``job.py`` has the processes of ``torchrun``; ``sharding.py`` hands a model to FSDP2 or to tensor parallelism.
"""
