"""One runnable script for each kind of user: reviewer, researcher, engineer."""
