"""Devices and workers: one device, DDP, ZeRO; the allocator."""
