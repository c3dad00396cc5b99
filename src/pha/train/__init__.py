"""Training: recipes, one loop on Accelerate for every model, checkpoints, run folders."""
