//! Files, flags and the documentation of both.

use tale_models::ModelSource;
use tale_models::device::DeviceSpec;
use tale_models::kv::PrefixCache;
use tale_models::tools::ToolFormat;

use super::*;

fn resolve(toml: &str, flags: Settings) -> Result<Config, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tale.toml");
    std::fs::write(&path, toml).unwrap();
    let shown = |error: ConfigError| error.to_string().replace(&*dir.path().to_string_lossy(), "");
    Config::resolve(Some(&path), flags).map_err(shown)
}

fn check_error(toml: &str, expected: &[&str]) {
    let error = resolve(toml, Settings::default()).unwrap_err();
    assert!(!error.contains('\n'), "one line: {error}");
    for part in expected {
        assert!(error.contains(part), "`{part}` is not in `{error}`");
    }
}

#[test]
fn every_key_of_the_documentation_is_read_and_means_what_it_says() {
    let document = include_str!("../../docs/configuration.md");
    let example = document.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    let config = resolve(example, Settings::default()).unwrap();
    assert_eq!(config.engine.load.load_format, LoadFormat::Auto);
    let dummy = resolve(&example.replace("load_format = \"auto\"", "load_format = \"dummy\""), Settings::default());
    assert_eq!(dummy.unwrap().engine.load.load_format, LoadFormat::Dummy);
    assert_eq!(config.listen, "10.0.0.5:8080".parse().unwrap());
    assert_eq!(config.engine.memory_bytes, Some(24 << 30));
    assert_eq!(config.engine.load.kv_cache_bytes, 4 << 30);
    assert_eq!(config.engine.load.kv_cache_dtype, KvCacheDtype::Int8);
    assert_eq!(config.engine.load.prefix_cache, PrefixCache::Shared);
    let lookup = PromptLookup { num_speculative_tokens: 8, prompt_lookup_min: 3, prompt_lookup_max: 5 };
    assert_eq!(config.engine.load.prompt_lookup, Some(lookup));
    assert_eq!(config.engine.load.max_batch_tokens, 1024);
    assert_eq!(config.engine.load.max_batch_sequences, 32);
    assert_eq!(config.engine.load.max_denoise_rows, 2);
    assert_eq!(config.engine.load.lora_cache_bytes, 2 << 30);
    assert_eq!(config.engine.load.tool_call_parser, Some(ToolFormat::Hermes));
    assert_eq!(config.engine.max_queued_sessions, 100);
    assert_eq!(config.engine.weight_dtype, WeightDtype::Bf16);
    assert_eq!(config.server.max_requests, 500);
    assert_eq!((config.server.max_body_memory, config.server.compute_threads), (2 << 30, 4));
    let Retention { max_active_jobs, max_ended_jobs, max_file_bytes, .. } = config.server.retention;
    assert_eq!((max_active_jobs, max_ended_jobs, max_file_bytes), (64, 200, 20 << 30));
    assert_eq!(config.drain, Duration::from_secs(60));
    assert_eq!(config.server.min_free_disk_bytes, 2 << 30);
    assert_eq!(config.server.output_dir, Some("/var/lib/clips".into()));
    assert_eq!(config.jobs.state_dir, Some(StateDir::Folder("/var/lib/tale".into())));
    let url = config.jobs.database_url.as_ref().map(DatabaseUrl::expose);
    assert_eq!((url, config.jobs.node_name.as_deref()), (Some("postgres://tale@db/tale"), Some("node-7")));
    assert_eq!(config.server.cors_origins, ["https://studio.example".parse().unwrap()]);
    assert_eq!(config.server.allowed_hosts, [".svc.cluster.local".parse().unwrap()]);
    assert_eq!(config.health_listen, Some("10.0.0.5:8081".parse().unwrap()));
    let ConnectionLimits { max_connections, max_per_address, header, idle, send } = config.server.connections;
    assert_eq!((max_connections, max_per_address), (Some(4096), Some(1024)));
    assert_eq!([header, idle, send], [5, 60, 120].map(Duration::from_secs));
    assert!(config.unsafe_log_prompts && config.allow_core_dumps);
    assert_eq!(config.log_format, LogFormat::Json);
    assert_eq!(config.models.len(), 2);
    assert_eq!(config.models[0].name, "chat");
}

/// A stand-in for `tale serve` with nothing but the settings.
#[derive(clap::Parser)]
struct Flags {
    #[command(flatten)]
    settings: Settings,
}

#[test]
fn documentation_and_help_name_the_defaults_of_the_code() {
    let document = include_str!("../../docs/configuration.md");
    let help = <Flags as clap::CommandFactory>::command().render_long_help().to_string();
    let config = Config::resolve(None, Settings { models: vec![parse_model("a=/x").unwrap()], ..Settings::default() });
    let Config { listen, engine, drain, server, .. } = config.unwrap();
    let gib = |bytes: usize| format!("{}GiB", bytes >> 30);
    for (key, default) in [
        ("listen", listen.to_string()),
        ("device", engine.devices[0].to_string()),
        ("load_format", "auto".to_owned()),
        ("kv_cache", gib(engine.load.kv_cache_bytes)),
        ("kv_cache_dtype", engine.load.kv_cache_dtype.to_string()),
        ("prefix_cache", "per-client".to_owned()),
        ("num_speculative_tokens", "0".to_owned()),
        ("prompt_lookup_min", guesses::DEFAULT_MIN.to_string()),
        ("prompt_lookup_max", guesses::DEFAULT_MAX.to_string()),
        ("max_batch_tokens", engine.load.max_batch_tokens.to_string()),
        ("max_batch_sequences", engine.load.max_batch_sequences.to_string()),
        ("max_denoise_rows", engine.load.max_denoise_rows.to_string()),
        ("lora_cache", gib(engine.load.lora_cache_bytes)),
        ("max_queued", engine.max_queued_sessions.to_string()),
        ("max_requests", server.max_requests.to_string()),
        ("max_body_memory", gib(server.max_body_memory)),
        ("max_active_jobs", server.retention.max_active_jobs.to_string()),
        ("max_ended_jobs", server.retention.max_ended_jobs.to_string()),
        ("max_clip_storage", gib(server.retention.max_file_bytes as usize)),
        ("min_free_disk", format!("{}MiB", server.min_free_disk_bytes >> 20)),
        ("drain_seconds", drain.as_secs().to_string()),
        ("header_seconds", server.connections.header.as_secs().to_string()),
        ("idle_seconds", server.connections.idle.as_secs().to_string()),
        ("send_seconds", server.connections.send.as_secs().to_string()),
    ] {
        let line = document.lines().find(|line| line.starts_with(&format!("{key} = "))).unwrap();
        let ends =
            |line: &str| line.ends_with(&format!("default {default}")) || line.contains(&format!("default {default}:"));
        assert!(ends(line), "{key} should default to {default}: {line}");
        let flag = help.split(&format!("--{} <", key.replace('_', "-"))).nth(1).unwrap();
        let flag = flag.split(" --").next().unwrap();
        assert!(flag.contains(&format!("[default: {default}]")), "--{key} should default to {default}: {flag}");
    }
}

#[test]
fn devices_are_named_for_the_server_and_for_models() {
    let toml = "device = [\"cpu:0/2\", \"cpu:1/2\"]\n[models]\na = \"/a\"\n[models.b]\npath = \"/b\"\ndevices = \"cpu:1/2\"\n\
                [models.c]\npath = \"/c\"\nreplicas = 2\n";
    let config = resolve(toml, Settings::default()).unwrap();
    let parts = [0, 1].map(|part| DeviceSpec::CpuPart { part, of: 2 });
    assert_eq!(config.engine.devices, parts);
    let found: Vec<_> = config.models.iter().map(|model| (model.devices.len(), model.replicas)).collect();
    assert_eq!(found, [(0, None), (1, None), (0, NonZeroUsize::new(2))]);
    assert_eq!(config.models[1].devices, parts[1..]);
    let flags =
        <Flags as clap::Parser>::parse_from(["tale", "--device", "cuda:0,cuda:1", "--model", "a=/x,device=cuda:1"]);
    let config = resolve(toml, flags.settings).unwrap();
    assert_eq!(config.engine.devices, [DeviceSpec::Cuda(0), DeviceSpec::Cuda(1)]);
    assert_eq!(config.models[0].devices, [DeviceSpec::Cuda(1)]);
    check_error("device = []\n", &[":1: `device`: ", "the list is empty"]);
    check_error("[models.a]\npath = \"/a\"\ndevices = [\"gpu0\"]\n", &["`models.a", "`gpu0` is not a device"]);
    check_error("[models.a]\npath = \"/a\"\nreplicas = 0\n", &["`models.a", "zero"]);
}

#[test]
fn models_come_and_go_as_is_said_of_all_and_of_one() {
    let toml = "idle_unload_seconds = 600\nmodel_management = true\nmodels_dir = \"m\"\n[models]\na = \"/a\"\n[models.b]\n\
                path = \"/b\"\nload = \"on-demand\"\nidle_unload_seconds = 60\n";
    let flags = Settings { models: vec![parse_model("c=/c,load=on-demand").unwrap()], ..Settings::default() };
    let config = resolve(toml, flags).unwrap();
    let found: Vec<_> = config.models.iter().map(|model| (model.on_demand, model.idle_unload)).collect();
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    assert_eq!(found, [(false, seconds(600)), (true, seconds(60)), (true, seconds(600))]);
    let management = config.server.model_management.unwrap();
    assert!(management.models_dir.unwrap().is_absolute());
    assert_eq!(management.configured, ["/a", "/b", "/c"].map(std::path::PathBuf::from));
    check_error("[models.a]\npath = \"/a\"\nload = \"never\"\n", &["`models.a", "`start`", "`on-demand`"]);
    check_error("idle_unload_seconds = 0\n", &[":1: `idle_unload_seconds`: ", "zero"]);
    assert!(resolve("[models]\na = \"/a\"\n", Settings::default()).unwrap().server.model_management.is_none());
}

#[test]
fn flags_win_and_models_are_joined_by_name() {
    let flags = Settings {
        models: vec![parse_model("chat=/b").unwrap(), parse_model("wan=/c").unwrap()],
        max_queued: NonZeroUsize::new(7),
        ..Settings::default()
    };
    let config =
        resolve("max_queued = 5\nmax_denoise_rows = 3\n[models]\nchat = \"/a\"\nflux = \"/d\"", flags).unwrap();
    let models: Vec<_> = config.models.iter().map(|m| (m.name.as_str(), m.source.path.to_str().unwrap())).collect();
    assert_eq!(models, [("chat", "/b"), ("flux", "/d"), ("wan", "/c")]);
    assert_eq!((config.engine.max_queued_sessions, config.engine.load.max_denoise_rows), (7, 3));
}

#[test]
fn paths_in_the_file_are_relative_to_the_file() {
    let config = resolve("output_dir = \"clips\"\n[models]\na = \"m/a\"", Settings::default()).unwrap();
    let folder = config.models[0].source.path.parent().unwrap().parent().unwrap();
    assert!(folder.is_absolute());
    assert_eq!(config.server.output_dir.unwrap(), folder.join("clips"));
}

#[test]
fn a_model_may_be_a_table() {
    let toml = "[models]\nb = \"m/b\"\n[models.a]\npath = \"a.safetensors\"\nbase = \"m/base\"\n";
    let config = resolve(toml, Settings::default()).unwrap();
    let folder = config.models[0].source.path.parent().unwrap();
    assert_eq!(config.models[0].source.base, Some(folder.join("m/base")));
    assert_eq!(config.models[1].source, ModelSource::at(folder.join("m/b")));
}

/// A model's own settings go before those of all, one by one; a model that says nothing is as all others are.
#[test]
fn a_model_may_guess_in_its_own_way() {
    let toml = "num_speculative_tokens = 5\nprompt_lookup_min = 3\n[models]\nd = \"/d\"\n[models.a]\npath = \"/a\"\n\
                num_speculative_tokens = 0\n[models.b]\npath = \"/b\"\nprompt_lookup_max = 9\n";
    let flags = Settings {
        models: vec![parse_model("c=/c,num_speculative_tokens=2,prompt_lookup_min=1").unwrap()],
        prompt_lookup_max: NonZeroUsize::new(6),
        ..Settings::default()
    };
    let config = resolve(toml, flags).unwrap();
    let lookup = |num_speculative_tokens, prompt_lookup_min, prompt_lookup_max| {
        Some(PromptLookup { num_speculative_tokens, prompt_lookup_min, prompt_lookup_max })
    };
    assert_eq!(config.engine.load.prompt_lookup, lookup(5, 3, 6));
    let found: Vec<_> = config.models.iter().map(|model| (model.name.as_str(), model.prompt_lookup)).collect();
    let expected = [("a", Some(None)), ("b", Some(lookup(5, 3, 9))), ("c", Some(lookup(2, 1, 6))), ("d", None)];
    for (name, of_model) in expected {
        assert!(found.contains(&(name, of_model)), "{name}: {found:?}");
    }
}

#[test]
fn errors_name_file_line_and_key() {
    check_error("listen = \"127.0.0.1:1\"\nmax_batch_tokens = 0\n", &["/tale.toml:2: `max_batch_tokens`: ", "zero"]);
    check_error("\nkv_cache = \"4 GiBs\"\n", &["/tale.toml:2: `kv_cache`: ", "`4 GiBs` is not a size"]);
    check_error("dtype = \"int4\"\n", &[":1: `dtype`: ", "auto, f32, bf16, f16"]);
    check_error(
        "prompt_lookup_min = 5\n[models]\na = \"/x\"\n",
        &["prompt_lookup_min is 5; allowed: 1 to 4, which is prompt_lookup_max"],
    );
    check_error(
        "prompt_lookup_max = 3\n[models.a]\npath = \"/x\"\nprompt_lookup_min = 4\n",
        &["models.a: prompt_lookup_min is 4; allowed: 1 to 3"],
    );
    check_error("[models.a]\npath = \"/x\"\nprompt_lookup_min = 0\n", &["`models.a", "zero"]);
    check_error("kv_cache_dtype = \"fp8_e5m2\"\n", &[":1: `kv_cache_dtype`: ", "auto, f32, bf16, f16, int8, fp8"]);
    check_error("prefix_cache = \"on\"\n", &[":1: `prefix_cache`: ", "`off`, `per-client`, `shared`"]);
    check_error("load_format = \"gguf\"\n", &[":1: `load_format`: ", "auto, dummy"]);
    check_error("device = \"tpu\"\n", &[":1: `device`: ", "cpu"]);
    check_error("listen = \"localhost\"\n", &[":1: `listen`: ", "socket address"]);
    check_error("cors_origins = [\"https://a/b\"]\n", &[":1: `cors_origins`: ", "`https://a/b` is not an origin"]);
    check_error("allowed_hosts = [\"a:80\"]\n", &[":1: `allowed_hosts`: ", "`a:80` is not a host name"]);
    check_error("header_seconds = 0\n", &[":1: `header_seconds`: ", "zero"]);
    check_error("lissten = \"x\"\n", &[":1: ", "unknown field `lissten`", "`listen`"]);
    check_error("[models]\n\"a b\" = \"/x\"\n", &["`models`: `a b` is not a model name"]);
    check_error("[models]\na = 3\n", &[":2: `models.a`: ", "integer `3`"]);
    check_error("[models.a]\npath = \"/x\"\nbass = \"/y\"\n", &["`models.a", "unknown field `bass`", "`base`"]);
    check_error("[models.a]\nbase = \"/y\"\n", &["`models.a`: ", "missing field `path`"]);
    check_error("max_queued = \n", &[":1: "]);
    check_error("", &["no model to serve"]);
    let missing = Config::resolve(Some(Path::new("/no/such.toml")), Settings::default()).unwrap_err();
    assert!(missing.to_string().starts_with("/no/such.toml: No such file"), "{missing}");
}

#[test]
fn two_models_of_one_name_are_refused() {
    let twice = vec![parse_model("a=/x").unwrap(), parse_model("a=/y").unwrap()];
    let error = Config::resolve(None, Settings { models: twice, ..Settings::default() }).unwrap_err();
    assert_eq!(error.to_string(), "--model: `a` is given twice");
}

#[test]
fn the_address_of_a_database_may_stand_in_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("database");
    std::fs::write(&path, "postgres://tale:secret@db/tale\n").unwrap();
    let toml = format!("database_url_file = {path:?}\nstate_dir = \"none\"\n[models]\na = \"/a\"\n");
    let config = resolve(&toml, Settings::default()).unwrap();
    assert_eq!(config.jobs.database_url.as_ref().map(DatabaseUrl::expose), Some("postgres://tale:secret@db/tale"));
    assert_eq!(config.jobs.state_dir, Some(StateDir::None));
    assert!(!format!("{config:?}").contains("secret"));
    std::fs::write(&path, "mysql://tale:secret@db/tale").unwrap();
    let refused = resolve(&toml, Settings::default()).unwrap_err();
    assert!(refused.contains("expected postgres://") && !refused.contains("secret"), "{refused}");
}
