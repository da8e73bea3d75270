"""The warm site worker: one process of a site keeps model, data and kernels, and works for each ClientApp."""
