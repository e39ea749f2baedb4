"""What runs the claims: the seal over the files, the run, the evidence it leaves."""
