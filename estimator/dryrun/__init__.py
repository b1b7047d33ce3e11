"""The dry run: real model code, loss, backward and optimizer on fake tensors, replayed through a model of the allocator.

Needs torch and transformers, no accelerator and no weights; ``estimator.dryrun.run.dry_run`` is its entry.
"""
