"""Number formats with unambiguous names: storages, packing, dequantising and our quantisers."""
