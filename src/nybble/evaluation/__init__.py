"""What a loaded model can do: answers to questions, choices by likelihood, tasks of lm-evaluation-harness."""
