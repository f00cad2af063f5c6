"""The unified study: every adaptation method on the same real tasks, tuned alike."""
