// SPDX-License-Identifier: Apache-2.0
// Written by `python -m perf.capacity_page`. Do not edit.
const SUSTAINED = 0.95;
const CAPACITY = [
 {
  "model": "llama-2-70b tp2 fp8",
  "gpu": "NVIDIA H200",
  "gpus": 2,
  "rows": [
   {
    "replicas": 1,
    "policy": "both",
    "rate": 8.0,
    "first_token_p99": 0.1554,
    "cached_share": 0.8381,
    "arrivals_per_second": 7.233,
    "requests_per_second": 7.058,
    "prompt_tokens_per_second": 4982.0,
    "output_tokens_per_second": 2184.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 10.0,
    "first_token_p99": 0.164,
    "cached_share": 0.8491,
    "arrivals_per_second": 10.02,
    "requests_per_second": 9.867,
    "prompt_tokens_per_second": 7254.0,
    "output_tokens_per_second": 3050.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 12.0,
    "first_token_p99": 0.1683,
    "cached_share": 0.8297,
    "arrivals_per_second": 11.75,
    "requests_per_second": 11.81,
    "prompt_tokens_per_second": 8903.0,
    "output_tokens_per_second": 3731.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 14.0,
    "first_token_p99": 0.1655,
    "cached_share": 0.8025,
    "arrivals_per_second": 13.11,
    "requests_per_second": 13.14,
    "prompt_tokens_per_second": 9032.0,
    "output_tokens_per_second": 4026.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 16.0,
    "first_token_p99": 0.2291,
    "cached_share": 0.7542,
    "arrivals_per_second": 15.4,
    "requests_per_second": 15.22,
    "prompt_tokens_per_second": 10330.0,
    "output_tokens_per_second": 4815.0
   }
  ]
 },
 {
  "model": "llama-2-70b tp2",
  "gpu": "NVIDIA H200",
  "gpus": 2,
  "rows": [
   {
    "replicas": 1,
    "policy": "both",
    "rate": 6.0,
    "first_token_p99": 0.2256,
    "cached_share": 0.8582,
    "arrivals_per_second": 6.15,
    "requests_per_second": 6.208,
    "prompt_tokens_per_second": 4675.0,
    "output_tokens_per_second": 1923.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 8.0,
    "first_token_p99": 0.2535,
    "cached_share": 0.8298,
    "arrivals_per_second": 7.358,
    "requests_per_second": 7.208,
    "prompt_tokens_per_second": 5088.0,
    "output_tokens_per_second": 2204.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 10.0,
    "first_token_p99": 0.3795,
    "cached_share": 0.7784,
    "arrivals_per_second": 10.02,
    "requests_per_second": 9.767,
    "prompt_tokens_per_second": 7099.0,
    "output_tokens_per_second": 3001.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 12.0,
    "first_token_p99": 0.4182,
    "cached_share": 0.7316,
    "arrivals_per_second": 11.5,
    "requests_per_second": 11.91,
    "prompt_tokens_per_second": 8841.0,
    "output_tokens_per_second": 3669.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 14.0,
    "first_token_p99": 0.527,
    "cached_share": 0.6942,
    "arrivals_per_second": 12.85,
    "requests_per_second": 11.97,
    "prompt_tokens_per_second": 8036.0,
    "output_tokens_per_second": 3493.0
   },
   {
    "replicas": 8,
    "policy": "both",
    "rate": 6.0,
    "first_token_p99": 0.216,
    "cached_share": 0.8228,
    "arrivals_per_second": 47.0,
    "requests_per_second": 46.0,
    "prompt_tokens_per_second": 31410.0,
    "output_tokens_per_second": 14000.0
   },
   {
    "replicas": 8,
    "policy": "both",
    "rate": 8.0,
    "first_token_p99": 0.2593,
    "cached_share": 0.8122,
    "arrivals_per_second": 62.07,
    "requests_per_second": 59.73,
    "prompt_tokens_per_second": 39550.0,
    "output_tokens_per_second": 16860.0
   },
   {
    "replicas": 8,
    "policy": "both",
    "rate": 10.0,
    "first_token_p99": 0.3083,
    "cached_share": 0.7423,
    "arrivals_per_second": 73.87,
    "requests_per_second": 72.67,
    "prompt_tokens_per_second": 49300.0,
    "output_tokens_per_second": 20850.0
   }
  ]
 },
 {
  "model": "llama-3-8b",
  "gpu": "NVIDIA H200",
  "gpus": 1,
  "rows": [
   {
    "replicas": 1,
    "policy": "both",
    "rate": 24.0,
    "first_token_p99": 0.0621,
    "cached_share": 0.7305,
    "arrivals_per_second": 24.45,
    "requests_per_second": 24.21,
    "prompt_tokens_per_second": 17540.0,
    "output_tokens_per_second": 7303.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 32.0,
    "first_token_p99": 0.08731,
    "cached_share": 0.6329,
    "arrivals_per_second": 31.51,
    "requests_per_second": 31.01,
    "prompt_tokens_per_second": 22210.0,
    "output_tokens_per_second": 9297.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 36.0,
    "first_token_p99": 0.1164,
    "cached_share": 0.5618,
    "arrivals_per_second": 35.46,
    "requests_per_second": 34.36,
    "prompt_tokens_per_second": 24260.0,
    "output_tokens_per_second": 10370.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 40.0,
    "first_token_p99": 2.004,
    "cached_share": 0.5364,
    "arrivals_per_second": 39.28,
    "requests_per_second": 37.71,
    "prompt_tokens_per_second": 27000.0,
    "output_tokens_per_second": 11110.0
   }
  ]
 },
 {
  "model": "llama-7b fp8",
  "gpu": "NVIDIA H200",
  "gpus": 1,
  "rows": [
   {
    "replicas": 1,
    "policy": "both",
    "rate": 14.0,
    "first_token_p99": 0.05232,
    "cached_share": 0.4619,
    "arrivals_per_second": 13.2,
    "requests_per_second": 13.33,
    "prompt_tokens_per_second": 9164.0,
    "output_tokens_per_second": 4098.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 16.0,
    "first_token_p99": 0.05666,
    "cached_share": 0.4164,
    "arrivals_per_second": 15.36,
    "requests_per_second": 15.35,
    "prompt_tokens_per_second": 10500.0,
    "output_tokens_per_second": 4857.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 18.0,
    "first_token_p99": 0.0865,
    "cached_share": 0.3266,
    "arrivals_per_second": 17.92,
    "requests_per_second": 17.9,
    "prompt_tokens_per_second": 13140.0,
    "output_tokens_per_second": 5371.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 20.0,
    "first_token_p99": 0.09111,
    "cached_share": 0.3058,
    "arrivals_per_second": 19.04,
    "requests_per_second": 18.39,
    "prompt_tokens_per_second": 13240.0,
    "output_tokens_per_second": 5424.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 22.0,
    "first_token_p99": null,
    "cached_share": 0.1417,
    "arrivals_per_second": 21.78,
    "requests_per_second": 18.82,
    "prompt_tokens_per_second": 13670.0,
    "output_tokens_per_second": 5455.0
   }
  ]
 },
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
   },
   {
    "replicas": 32,
    "policy": "random",
    "rate": 16.0,
    "first_token_p99": 0.1233,
    "cached_share": 0.01054,
    "arrivals_per_second": 513.2,
    "requests_per_second": 402.0,
    "prompt_tokens_per_second": 279100.0,
    "output_tokens_per_second": 104200.0
   },
   {
    "replicas": 32,
    "policy": "least loaded",
    "rate": 16.0,
    "first_token_p99": 0.1035,
    "cached_share": 0.04872,
    "arrivals_per_second": 514.5,
    "requests_per_second": 409.8,
    "prompt_tokens_per_second": 281800.0,
    "output_tokens_per_second": 108400.0
   },
   {
    "replicas": 32,
    "policy": "prefix hash",
    "rate": 16.0,
    "first_token_p99": 0.09177,
    "cached_share": 0.3864,
    "arrivals_per_second": 519.2,
    "requests_per_second": 426.2,
    "prompt_tokens_per_second": 289800.0,
    "output_tokens_per_second": 116600.0
   },
   {
    "replicas": 32,
    "policy": "both",
    "rate": 16.0,
    "first_token_p99": 0.09205,
    "cached_share": 0.3578,
    "arrivals_per_second": 519.5,
    "requests_per_second": 423.2,
    "prompt_tokens_per_second": 289500.0,
    "output_tokens_per_second": 115300.0
   },
   {
    "replicas": 64,
    "policy": "random",
    "rate": 16.0,
    "first_token_p99": 0.1196,
    "cached_share": 0.007813,
    "arrivals_per_second": 1017.0,
    "requests_per_second": 824.2,
    "prompt_tokens_per_second": 589100.0,
    "output_tokens_per_second": 217500.0
   },
   {
    "replicas": 64,
    "policy": "least loaded",
    "rate": 16.0,
    "first_token_p99": 0.1039,
    "cached_share": 0.04167,
    "arrivals_per_second": 1020.0,
    "requests_per_second": 843.2,
    "prompt_tokens_per_second": 605200.0,
    "output_tokens_per_second": 227700.0
   },
   {
    "replicas": 64,
    "policy": "prefix hash",
    "rate": 16.0,
    "first_token_p99": 0.09671,
    "cached_share": 0.3789,
    "arrivals_per_second": 1021.0,
    "requests_per_second": 864.8,
    "prompt_tokens_per_second": 623200.0,
    "output_tokens_per_second": 236400.0
   },
   {
    "replicas": 64,
    "policy": "both",
    "rate": 16.0,
    "first_token_p99": 0.09708,
    "cached_share": 0.3606,
    "arrivals_per_second": 1022.0,
    "requests_per_second": 871.5,
    "prompt_tokens_per_second": 633100.0,
    "output_tokens_per_second": 239300.0
   }
  ]
 },
 {
  "model": "qwen3-8b",
  "gpu": "NVIDIA H200",
  "gpus": 1,
  "rows": [
   {
    "replicas": 1,
    "policy": "both",
    "rate": 24.0,
    "first_token_p99": 0.06539,
    "cached_share": 0.7127,
    "arrivals_per_second": 24.46,
    "requests_per_second": 24.21,
    "prompt_tokens_per_second": 17510.0,
    "output_tokens_per_second": 7300.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 28.0,
    "first_token_p99": 0.08838,
    "cached_share": 0.6605,
    "arrivals_per_second": 27.5,
    "requests_per_second": 27.25,
    "prompt_tokens_per_second": 19400.0,
    "output_tokens_per_second": 8183.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 32.0,
    "first_token_p99": 0.681,
    "cached_share": 0.6107,
    "arrivals_per_second": 31.48,
    "requests_per_second": 30.93,
    "prompt_tokens_per_second": 22140.0,
    "output_tokens_per_second": 9283.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 36.0,
    "first_token_p99": null,
    "cached_share": 0.4912,
    "arrivals_per_second": 34.79,
    "requests_per_second": 31.47,
    "prompt_tokens_per_second": 22160.0,
    "output_tokens_per_second": 9580.0
   },
   {
    "replicas": 1,
    "policy": "both",
    "rate": 40.0,
    "first_token_p99": null,
    "cached_share": 0.4208,
    "arrivals_per_second": 37.41,
    "requests_per_second": 31.49,
    "prompt_tokens_per_second": 22220.0,
    "output_tokens_per_second": 9467.0
   }
  ]
 }
];
