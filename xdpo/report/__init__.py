"""What people read of scores: tables, figures, and pages as Markdown and HTML."""
