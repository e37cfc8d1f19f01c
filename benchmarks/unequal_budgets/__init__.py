"""What budgets that differ between layers or heads would gain over equal ones, at equal total memory."""
