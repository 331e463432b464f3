"""Surface A, inside."""
