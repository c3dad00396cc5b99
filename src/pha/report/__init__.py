"""One self-contained HTML page that compares training runs, its plots, and tables for terminals."""
