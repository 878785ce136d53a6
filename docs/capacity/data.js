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
   }
  ]
 }
];
