"""Takes weights from the learner into running engines, and proves that they arrived."""
