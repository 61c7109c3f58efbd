"""lm-evaluation-harness as a library: its tasks, its requests, its aggregation; our models, workers and store.

names       which tasks there are, without importing lm_eval
adapter     an `overfill.engine.Engine` as an lm_eval model
loading     tasks by name, from local folders and lm_eval's registry, with the experiment's settings applied
shards      which documents a worker answers, and answers that are kept
aggregate   all answers -> lm_eval's own evaluation -> metrics and one row per sample
results     what a finished stage holds, for reports; neither torch nor lm_eval
"""
