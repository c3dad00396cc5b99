"""What every part of the package may use: errors, files, run folders, hardware facts."""
