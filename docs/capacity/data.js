// SPDX-License-Identifier: Apache-2.0
// Written by `python -m perf.capacity_page`. Do not edit.
const SUSTAINED = 0.95;
const CAPACITY = [
 {
  "model": "llama-7b",
  "gpu": "NVIDIA H200",
  "gpus": 1,
  "rows": [
   {
    "replicas": 1,
    "policy": "random",
    "rate": 16.0,
    "first_token_p99": 0.09094,
    "cached_share": 0.4363,
    "arrivals_per_second": 15.17,
    "requests_per_second": 15.28,
    "prompt_tokens_per_second": 10400.0,
    "output_tokens_per_second": 4853.0
   },
   {
    "replicas": 1,
    "policy": "least loaded",
    "rate": 16.0,
    "first_token_p99": 0.09094,
    "cached_share": 0.4363,
    "arrivals_per_second": 15.17,
    "requests_per_second": 15.28,
    "prompt_tokens_per_second": 10400.0,
    "output_tokens_per_second": 4853.0
   },
   {
    "replicas": 1,
    "policy": "prefix hash",
    "rate": 16.0,
    "first_token_p99": 0.09094,
    "cached_share": 0.4363,
    "arrivals_per_second": 15.17,
    "requests_per_second": 15.28,
    "prompt_tokens_per_second": 10400.0,
    "output_tokens_per_second": 4853.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 16.0,
    "first_token_p99": 0.09094,
    "cached_share": 0.4363,
    "arrivals_per_second": 15.17,
    "requests_per_second": 15.28,
    "prompt_tokens_per_second": 10400.0,
    "output_tokens_per_second": 4853.0
   },
   {
    "replicas": 2,
    "policy": "random",
    "rate": 16.0,
    "first_token_p99": 0.1347,
    "cached_share": 0.1925,
    "arrivals_per_second": 31.67,
    "requests_per_second": 29.78,
    "prompt_tokens_per_second": 20940.0,
    "output_tokens_per_second": 8643.0
   },
   {
    "replicas": 2,
    "policy": "least loaded",
    "rate": 16.0,
    "first_token_p99": 0.1046,
    "cached_share": 0.2299,
    "arrivals_per_second": 31.68,
    "requests_per_second": 30.07,
    "prompt_tokens_per_second": 21140.0,
    "output_tokens_per_second": 8761.0
   },
   {
    "replicas": 2,
    "policy": "prefix hash",
    "rate": 16.0,
    "first_token_p99": 0.09744,
    "cached_share": 0.381,
    "arrivals_per_second": 31.68,
    "requests_per_second": 30.45,
    "prompt_tokens_per_second": 21430.0,
    "output_tokens_per_second": 8932.0
   },
   {
    "replicas": 2,
    "policy": "both",
    "rate": 16.0,
    "first_token_p99": 0.0992,
    "cached_share": 0.3751,
    "arrivals_per_second": 31.68,
    "requests_per_second": 30.48,
    "prompt_tokens_per_second": 21480.0,
    "output_tokens_per_second": 8942.0
   },
   {
    "replicas": 4,
    "policy": "random",
    "rate": 16.0,
    "first_token_p99": 0.1049,
    "cached_share": 0.1167,
    "arrivals_per_second": 62.47,
    "requests_per_second": 57.87,
    "prompt_tokens_per_second": 38930.0,
    "output_tokens_per_second": 16170.0
   },
   {
    "replicas": 4,
    "policy": "least loaded",
    "rate": 16.0,
    "first_token_p99": 0.09847,
    "cached_share": 0.1553,
    "arrivals_per_second": 62.7,
    "requests_per_second": 58.37,
    "prompt_tokens_per_second": 39460.0,
    "output_tokens_per_second": 16450.0
   },
   {
    "replicas": 4,
    "policy": "prefix hash",
    "rate": 16.0,
    "first_token_p99": 0.09213,
    "cached_share": 0.4323,
    "arrivals_per_second": 62.9,
    "requests_per_second": 59.17,
    "prompt_tokens_per_second": 39940.0,
    "output_tokens_per_second": 16900.0
   },
   {
    "replicas": 4,
    "policy": "both",
    "rate": 16.0,
    "first_token_p99": 0.08952,
    "cached_share": 0.4104,
    "arrivals_per_second": 62.83,
    "requests_per_second": 59.1,
    "prompt_tokens_per_second": 39850.0,
    "output_tokens_per_second": 16880.0
   },
   {
    "replicas": 8,
    "policy": "random",
    "rate": 8.0,
    "first_token_p99": 0.07231,
    "cached_share": 0.08868,
    "arrivals_per_second": 63.07,
    "requests_per_second": 64.13,
    "prompt_tokens_per_second": 42930.0,
    "output_tokens_per_second": 18530.0
   },
   {
    "replicas": 8,
    "policy": "least loaded",
    "rate": 8.0,
    "first_token_p99": 0.06072,
    "cached_share": 0.1238,
    "arrivals_per_second": 63.07,
    "requests_per_second": 63.93,
    "prompt_tokens_per_second": 42930.0,
    "output_tokens_per_second": 18460.0
   },
   {
    "replicas": 8,
    "policy": "prefix hash",
    "rate": 8.0,
    "first_token_p99": 0.04845,
    "cached_share": 0.679,
    "arrivals_per_second": 63.0,
    "requests_per_second": 64.07,
    "prompt_tokens_per_second": 42900.0,
    "output_tokens_per_second": 18440.0
   },
   {
    "replicas": 8,
    "policy": "both",
    "rate": 8.0,
    "first_token_p99": 0.04826,
    "cached_share": 0.5721,
    "arrivals_per_second": 63.0,
    "requests_per_second": 63.8,
    "prompt_tokens_per_second": 42860.0,
    "output_tokens_per_second": 18370.0
   },
   {
    "replicas": 8,
    "policy": "random",
    "rate": 12.0,
    "first_token_p99": 0.08929,
    "cached_share": 0.07002,
    "arrivals_per_second": 98.33,
    "requests_per_second": 97.2,
    "prompt_tokens_per_second": 67020.0,
    "output_tokens_per_second": 27560.0
   },
   {
    "replicas": 8,
    "policy": "least loaded",
    "rate": 12.0,
    "first_token_p99": 0.08497,
    "cached_share": 0.1058,
    "arrivals_per_second": 98.33,
    "requests_per_second": 97.47,
    "prompt_tokens_per_second": 67430.0,
    "output_tokens_per_second": 27790.0
   },
   {
    "replicas": 8,
    "policy": "prefix hash",
    "rate": 12.0,
    "first_token_p99": 0.06802,
    "cached_share": 0.4895,
    "arrivals_per_second": 98.33,
    "requests_per_second": 97.67,
    "prompt_tokens_per_second": 67230.0,
    "output_tokens_per_second": 27750.0
   },
   {
    "replicas": 8,
    "policy": "both",
    "rate": 12.0,
    "first_token_p99": 0.07479,
    "cached_share": 0.4386,
    "arrivals_per_second": 98.4,
    "requests_per_second": 98.33,
    "prompt_tokens_per_second": 68320.0,
    "output_tokens_per_second": 28250.0
   },
   {
    "replicas": 8,
    "policy": "random",
    "rate": 14.0,
    "first_token_p99": 0.1106,
    "cached_share": 0.05834,
    "arrivals_per_second": 114.7,
    "requests_per_second": 107.1,
    "prompt_tokens_per_second": 72360.0,
    "output_tokens_per_second": 30350.0
   },
   {
    "replicas": 8,
    "policy": "least loaded",
    "rate": 14.0,
    "first_token_p99": 0.08433,
    "cached_share": 0.078,
    "arrivals_per_second": 114.9,
    "requests_per_second": 109.3,
    "prompt_tokens_per_second": 73370.0,
    "output_tokens_per_second": 31380.0
   },
   {
    "replicas": 8,
    "policy": "prefix hash",
    "rate": 14.0,
    "first_token_p99": 0.08167,
    "cached_share": 0.4288,
    "arrivals_per_second": 114.8,
    "requests_per_second": 110.1,
    "prompt_tokens_per_second": 74530.0,
    "output_tokens_per_second": 31940.0
   },
   {
    "replicas": 8,
    "policy": "both",
    "rate": 14.0,
    "first_token_p99": 0.08132,
    "cached_share": 0.4015,
    "arrivals_per_second": 115.1,
    "requests_per_second": 110.7,
    "prompt_tokens_per_second": 75560.0,
    "output_tokens_per_second": 32420.0
   },
   {
    "replicas": 8,
    "policy": "random",
    "rate": 16.0,
    "first_token_p99": 0.1156,
    "cached_share": 0.04065,
    "arrivals_per_second": 127.2,
    "requests_per_second": 109.4,
    "prompt_tokens_per_second": 75600.0,
    "output_tokens_per_second": 31220.0
   },
   {
    "replicas": 8,
    "policy": "least loaded",
    "rate": 16.0,
    "first_token_p99": 0.1022,
    "cached_share": 0.09513,
    "arrivals_per_second": 127.7,
    "requests_per_second": 111.5,
    "prompt_tokens_per_second": 77960.0,
    "output_tokens_per_second": 32170.0
   },
   {
    "replicas": 8,
    "policy": "prefix hash",
    "rate": 16.0,
    "first_token_p99": 0.1079,
    "cached_share": 0.3901,
    "arrivals_per_second": 128.2,
    "requests_per_second": 116.4,
    "prompt_tokens_per_second": 80830.0,
    "output_tokens_per_second": 34460.0
   },
   {
    "replicas": 8,
    "policy": "both",
    "rate": 16.0,
    "first_token_p99": 0.1135,
    "cached_share": 0.3761,
    "arrivals_per_second": 128.3,
    "requests_per_second": 117.3,
    "prompt_tokens_per_second": 82320.0,
    "output_tokens_per_second": 34780.0
   },
   {
    "replicas": 8,
    "policy": "random",
    "rate": 20.0,
    "first_token_p99": 0.4911,
    "cached_share": 0.04066,
    "arrivals_per_second": 149.8,
    "requests_per_second": 116.9,
    "prompt_tokens_per_second": 79470.0,
    "output_tokens_per_second": 30170.0
   },
   {
    "replicas": 8,
    "policy": "least loaded",
    "rate": 20.0,
    "first_token_p99": 0.1395,
    "cached_share": 0.09385,
    "arrivals_per_second": 150.9,
    "requests_per_second": 120.3,
    "prompt_tokens_per_second": 81950.0,
    "output_tokens_per_second": 31530.0
   },
   {
    "replicas": 8,
    "policy": "prefix hash",
    "rate": 20.0,
    "first_token_p99": 0.2048,
    "cached_share": 0.3119,
    "arrivals_per_second": 152.3,
    "requests_per_second": 126.4,
    "prompt_tokens_per_second": 86410.0,
    "output_tokens_per_second": 34000.0
   },
   {
    "replicas": 8,
    "policy": "both",
    "rate": 20.0,
    "first_token_p99": 0.1364,
    "cached_share": 0.3019,
    "arrivals_per_second": 152.2,
    "requests_per_second": 126.5,
    "prompt_tokens_per_second": 86330.0,
    "output_tokens_per_second": 34120.0
   },
   {
    "replicas": 16,
    "policy": "random",
    "rate": 16.0,
    "first_token_p99": 0.1251,
    "cached_share": 0.02967,
    "arrivals_per_second": 251.6,
    "requests_per_second": 211.5,
    "prompt_tokens_per_second": 147600.0,
    "output_tokens_per_second": 57760.0
   },
   {
    "replicas": 16,
    "policy": "least loaded",
    "rate": 16.0,
    "first_token_p99": 0.09456,
    "cached_share": 0.07751,
    "arrivals_per_second": 252.1,
    "requests_per_second": 218.0,
    "prompt_tokens_per_second": 151500.0,
    "output_tokens_per_second": 60180.0
   },
   {
    "replicas": 16,
    "policy": "prefix hash",
    "rate": 16.0,
    "first_token_p99": 0.08412,
    "cached_share": 0.4317,
    "arrivals_per_second": 252.5,
    "requests_per_second": 221.3,
    "prompt_tokens_per_second": 153300.0,
    "output_tokens_per_second": 62220.0
   },
   {
    "replicas": 16,
    "policy": "both",
    "rate": 16.0,
    "first_token_p99": 0.0814,
    "cached_share": 0.4068,
    "arrivals_per_second": 252.5,
    "requests_per_second": 221.3,
    "prompt_tokens_per_second": 153800.0,
    "output_tokens_per_second": 62320.0
   }
  ]
 }
];
