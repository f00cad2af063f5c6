"""Fine-tunings of many jobs in one step: their plan, and the step that runs packed segments."""
