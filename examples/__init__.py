"""Programs that show one thing each; README.md finds them by question."""
