"""The audit trail: `record` (how a record becomes a line; twin of csrc/json.c), `log` (reading a file of them back)."""
