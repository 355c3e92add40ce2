//! Metrics: their names, buckets and handles. Logs are set up by the command line.
//!
//! Every metric of a model carries the label `model_name`; vLLM's names stand beside ours where autoscalers and
//! dashboards know them. No prompt, no answer and no client name is ever a label.

use std::sync::OnceLock;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tale_models::request::{FinishReason, Phase, Usage};

use crate::engine::EngineStatus;

/// Buckets of requests and first tokens, in seconds: vLLM's, so that its dashboards fit.
const LATENCY_BUCKETS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
/// Buckets of steps and of the time between tokens, in seconds.
const STEP_BUCKETS: [f64; 16] =
    [0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0];

/// Buckets of checkpoints, in bytes: powers of four from 64 KiB to 1 GiB.
const BYTE_BUCKETS: [f64; 8] =
    [65_536.0, 262_144.0, 1_048_576.0, 4_194_304.0, 16_777_216.0, 67_108_864.0, 268_435_456.0, 1_073_741_824.0];

/// How often collected samples are folded into buckets even when nobody asks for the metrics.
pub const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// The process-wide recorder; installed by the first call.
pub fn metrics_handle() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let step_names = [
            "tale_step_seconds",
            "tale_checkpoint_seconds",
            "tale_inter_token_seconds",
            "vllm:inter_token_latency_seconds",
        ];
        let mut builder =
            PrometheusBuilder::new().set_buckets(&LATENCY_BUCKETS).expect("the table has buckets: this is a bug");
        for name in step_names {
            builder = builder
                .set_buckets_for_metric(Matcher::Full(name.to_owned()), &STEP_BUCKETS)
                .expect("the table has buckets: this is a bug");
        }
        let of_bytes = Matcher::Full("tale_checkpoint_bytes".to_owned());
        builder =
            builder.set_buckets_for_metric(of_bytes, &BYTE_BUCKETS).expect("the table has buckets: this is a bug");
        builder.install_recorder().expect("nothing else installs a recorder: this is a bug")
    })
}

/// Handles of one model's metrics, made once so that a step only touches atomics.
pub struct ModelMetrics {
    steps: [(Phase, Histogram); 7],
    first_token: [Histogram; 2],
    inter_token: [Histogram; 2],
    queue_time: [Histogram; 2],
    prompt_tokens: [Counter; 2],
    prefix_cache_queries: [Counter; 2],
    prefix_cache_hits: [Counter; 2],
    draft_tokens: [Counter; 2],
    accepted_draft_tokens: [Counter; 2],
    generation_tokens: [Counter; 2],
    skipped_passes: Counter,
    checkpoint_seconds: Histogram,
    checkpoint_bytes: Histogram,
    ended: [(&'static str, Counter); 6],
}

impl ModelMetrics {
    /// Of the model with this name.
    pub fn new(model: &str) -> Self {
        metrics_handle();
        let phases = [
            Phase::Prefill,
            Phase::Decode,
            Phase::Load,
            Phase::Encode,
            Phase::VaeEncode,
            Phase::Denoise,
            Phase::VaeDecode,
        ];
        let outcomes = ["stop", "length", "complete", "failed", "cancelled", "handed_over"];
        let histograms = |ours: &'static str, theirs: &'static str| {
            [ours, theirs].map(|name| histogram!(name, "model_name" => model.to_owned()))
        };
        let counters = |ours: &'static str, theirs: &'static str| {
            [ours, theirs].map(|name| counter!(name, "model_name" => model.to_owned()))
        };
        Self {
            steps: phases.map(|phase| {
                let name = model.to_owned();
                (phase, histogram!("tale_step_seconds", "model_name" => name, "phase" => phase.as_str()))
            }),
            first_token: histograms("tale_ttft_seconds", "vllm:time_to_first_token_seconds"),
            inter_token: histograms("tale_inter_token_seconds", "vllm:inter_token_latency_seconds"),
            queue_time: histograms("tale_queue_seconds", "vllm:request_queue_time_seconds"),
            prompt_tokens: counters("tale_prompt_tokens_total", "vllm:prompt_tokens_total"),
            prefix_cache_queries: counters("tale_prefix_cache_queries_total", "vllm:prefix_cache_queries_total"),
            prefix_cache_hits: counters("tale_prefix_cache_hits_total", "vllm:prefix_cache_hits_total"),
            draft_tokens: counters("tale_draft_tokens_total", "vllm:spec_decode_num_draft_tokens_total"),
            accepted_draft_tokens: counters(
                "tale_accepted_draft_tokens_total",
                "vllm:spec_decode_num_accepted_tokens_total",
            ),
            generation_tokens: counters("tale_generation_tokens_total", "vllm:generation_tokens_total"),
            skipped_passes: counter!("tale_skipped_passes_total", "model_name" => model.to_owned()),
            checkpoint_seconds: histogram!("tale_checkpoint_seconds", "model_name" => model.to_owned()),
            checkpoint_bytes: histogram!("tale_checkpoint_bytes", "model_name" => model.to_owned()),
            ended: outcomes.map(|outcome| {
                let name = model.to_owned();
                (outcome, counter!("tale_sessions_total", "model_name" => name, "outcome" => outcome))
            }),
        }
    }

    /// A step took this long.
    pub fn step(&self, phase: Phase, cost: Duration) {
        if let Some((_, histogram)) = self.steps.iter().find(|(p, _)| *p == phase) {
            histogram.record(cost);
        }
    }

    /// A session began this long after it was submitted.
    pub fn queue_time(&self, waited: Duration) {
        self.queue_time.iter().for_each(|histogram| histogram.record(waited));
    }

    /// A session's first tokens came this long after it was submitted.
    pub fn first_token(&self, tokens: usize, waited: Duration) {
        self.first_token.iter().for_each(|histogram| histogram.record(waited));
        self.count_generated(tokens);
    }

    /// More tokens came this long after the ones before.
    pub fn inter_token(&self, tokens: usize, waited: Duration) {
        self.inter_token.iter().for_each(|histogram| histogram.record(waited / tokens.max(1) as u32));
        self.count_generated(tokens);
    }

    /// A session ended well.
    pub fn finished(&self, reason: FinishReason, usage: Usage) {
        self.prompt_tokens.iter().for_each(|counter| counter.increment(usage.prompt_tokens as u64));
        if let Some(cached_tokens) = usage.cached_tokens {
            self.prefix_cache_queries.iter().for_each(|counter| counter.increment(usage.prompt_tokens as u64));
            self.prefix_cache_hits.iter().for_each(|counter| counter.increment(cached_tokens as u64));
        }
        self.draft_tokens.iter().for_each(|counter| counter.increment(usage.draft_tokens as u64));
        let accepted = usage.accepted_draft_tokens as u64;
        self.accepted_draft_tokens.iter().for_each(|counter| counter.increment(accepted));
        self.skipped_passes.increment(usage.skipped_passes as u64);
        self.ended(match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Complete => "complete",
        });
    }

    /// A session failed.
    pub fn failed(&self) {
        self.ended("failed");
    }

    /// A checkpoint of a session was made in this time.
    pub fn checkpoint(&self, bytes: usize, cost: Duration) {
        self.checkpoint_bytes.record(bytes as f64);
        self.checkpoint_seconds.record(cost);
    }

    /// A session was left to another process.
    pub fn handed_over(&self) {
        self.ended("handed_over");
    }

    /// A session was cancelled.
    pub fn cancelled(&self) {
        self.ended("cancelled");
    }

    fn count_generated(&self, tokens: usize) {
        self.generation_tokens.iter().for_each(|counter| counter.increment(tokens as u64));
    }

    fn ended(&self, outcome: &str) {
        if let Some((_, counter)) = self.ended.iter().find(|(name, _)| *name == outcome) {
            counter.increment(1);
        }
    }
}

/// Copies a snapshot of the engine into gauges; called before the metrics are rendered.
pub fn publish_engine(status: &EngineStatus) {
    for device in &status.devices {
        let of = |name: &'static str| -> Gauge { gauge!(name, "device" => device.device.to_string()) };
        of("tale_ledger_used_bytes").set(device.ledger_used_bytes as f64);
        of("tale_ledger_capacity_bytes").set(device.ledger_capacity_bytes as f64);
        of("tale_device_alive").set(f64::from(u8::from(device.alive)));
    }
    for model in &status.models {
        let of = |name: &'static str| -> Gauge { gauge!(name, "model_name" => model.name.clone()) };
        // Preempted sessions wait inside the runner, new ones wait in the queue as well; both wait for their next step.
        let waiting = model.live.saturating_sub(model.runner.running);
        let usage = match model.runner.kv_blocks_total {
            0 => 0.0,
            total => model.runner.kv_blocks_used as f64 / total as f64,
        };
        of("tale_sessions_live").set(model.live as f64);
        of("tale_queue_depth").set(model.queued as f64);
        of("tale_sessions_running").set(model.runner.running as f64);
        of("tale_kv_blocks_used").set(model.runner.kv_blocks_used as f64);
        of("tale_kv_blocks_total").set(model.runner.kv_blocks_total as f64);
        of("vllm:num_requests_running").set(model.runner.running as f64);
        of("vllm:num_requests_waiting").set(waiting as f64);
        of("vllm:kv_cache_usage_perc").set(usage);
    }
}

/// Books one answered HTTP request. `route` is the template, never the path.
pub fn record_request(route: &str, method: &'static str, status: u16, seconds: Duration) {
    let labels = [("route", route.to_owned()), ("method", method.to_owned()), ("status", status.to_string())];
    counter!("tale_http_requests_total", &labels).increment(1);
    histogram!("tale_http_request_seconds", "route" => labels[0].1.clone()).record(seconds);
}

/// Copies the number of jobs that have not ended into its gauge.
pub fn publish_jobs(num_active: usize) {
    gauge!("tale_jobs_active").set(num_active as f64);
}
