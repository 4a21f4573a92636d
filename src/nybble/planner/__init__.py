"""What a run needs of memory and time, by arithmetic on shapes. Without torch."""
