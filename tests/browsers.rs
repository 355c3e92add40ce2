//! What web pages that reach the server through somebody's browser get.

use http_body_util::Full;
use hyper::Request;
use hyper::body::Bytes;
use serde_json::json;

use crate::support::{Answer, SECRET, Server, Setup, read, server, start};

async fn ask(server: &Server, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    read(server.send(request.body(Full::new(Bytes::from(body.to_owned()))).expect("a request")).await).await
}

async fn get(server: &Server, path: &str, headers: &[(&str, &str)]) -> Answer {
    ask(server, "GET", path, headers, "").await
}

#[track_caller]
fn check_refused(answer: Answer, code: &str, setting: &str) {
    let error = answer.expect(403).json()["error"].clone();
    let message = error["message"].as_str().expect("text");
    assert!(error["code"] == code && message.contains(setting) && !message.contains(SECRET), "{error}");
}

#[tokio::test]
async fn a_name_that_a_stranger_may_own_is_refused() {
    let server = server().await;
    let evil = format!("{SECRET}.example:8080");
    for path in ["/v1/models", "/metrics", "/openapi.json", "/nowhere"] {
        check_refused(get(&server, path, &[("host", &evil)]).await, "host_not_allowed", "allowed_hosts");
    }
    // A target that is a whole URL names a host of its own.
    let absolute = format!("http://{evil}/v1/models");
    check_refused(get(&server, &absolute, &[("host", "localhost")]).await, "host_not_allowed", "allowed_hosts");
    for host in ["localhost:8080", "127.0.0.1", "[::1]:80", "10.1.2.3:8080", "tale", "a.localhost"] {
        get(&server, "/v1/models", &[("host", host)]).await.expect(200);
    }
    // Probes ask by whatever name.
    get(&server, "/livez", &[("host", &evil)]).await.expect(200);
}

#[tokio::test]
async fn configured_names_are_answered_to() {
    let allowed_hosts = vec!["tale.example", ".svc.cluster.local"];
    let server = start(Setup { allowed_hosts, ..Setup::default() }).await;
    for host in ["tale.example", "TALE.example.:8080", "tale.default.svc.cluster.local:8080"] {
        get(&server, "/v1/models", &[("host", host)]).await.expect(200);
    }
    let answer = get(&server, "/v1/models", &[("host", "other.example")]).await;
    check_refused(answer, "host_not_allowed", "allowed_hosts");
    let any = start(Setup { allowed_hosts: vec!["*"], ..Setup::default() }).await;
    get(&any, "/v1/models", &[("host", "other.example")]).await.expect(200);
}

/// A form needs no permission beforehand, so that the page would only be kept from reading what it has set off.
#[tokio::test]
async fn a_foreign_page_sets_nothing_off() {
    let server = server().await;
    let form = "--b\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nclips\r\n--b\r\n\
                content-disposition: form-data; name=\"prompt\"\r\n\r\nx\r\n--b--\r\n";
    let page = format!("https://{SECRET}.example");
    let order = async |headers: &[(&str, &str)]| {
        let kind = [("content-type", "multipart/form-data; boundary=b"), ("host", "localhost:8080")];
        ask(&server, "POST", "/v1/videos", &[&kind, headers].concat(), form).await
    };
    check_refused(order(&[("origin", &page)]).await, "origin_not_allowed", "cors_origins");
    check_refused(order(&[("origin", "null")]).await, "origin_not_allowed", "cors_origins");
    let other_port = order(&[("origin", "http://localhost:3000")]).await;
    check_refused(other_port, "origin_not_allowed", "cors_origins");
    let jobs = get(&server, "/v1/videos", &[("host", "localhost:8080")]).await.expect(200).json();
    assert_eq!(jobs["data"], json!([]));
    let read = get(&server, "/v1/videos", &[("host", "localhost:8080"), ("origin", &page)]).await;
    check_refused(read, "origin_not_allowed", "cors_origins");
    order(&[("origin", "http://localhost:8080")]).await.expect(200);
    order(&[]).await.expect(200);
}

#[tokio::test]
async fn a_configured_page_may_call_and_others_may_not() {
    let server = start(Setup { cors_origins: vec!["https://studio.example"], ..Setup::default() }).await;
    let models = async |page: &str| get(&server, "/v1/models", &[("host", "localhost"), ("origin", page)]).await;
    models("https://studio.example").await.expect(200);
    check_refused(models("https://other.example").await, "origin_not_allowed", "cors_origins");
}
