"""What is counted, where, and the page that shows it."""
