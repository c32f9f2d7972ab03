"""What people see: console, results file, plan drawing."""
