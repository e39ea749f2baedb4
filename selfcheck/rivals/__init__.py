"""Other ways to select, quantise and decode, short and for comparison only."""
