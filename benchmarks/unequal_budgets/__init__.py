"""The gain of budgets that differ between layers or heads over equal ones, at equal total memory."""
