//! The HTTP pages.

use super::{Metrics, json};
use crate::engine::Report;
use crate::serve::Current;
use arc_swap::ArcSwap;
use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use std::sync::Arc;

/// What the pages show.
#[derive(Clone, Debug)]
pub struct AdminState {
    /// What is served.
    pub current: Current,
    /// What is wrong.
    pub report: Arc<ArcSwap<Report>>,
}

/// Health and debug pages. They show the whole configuration, so they belong on loopback.
pub fn admin_router(state: AdminState) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/debug/snapshot", get(snapshot))
        .route("/debug/report", get(report))
        .with_state(state)
}

/// `/metrics`, and health for probes that come from outside.
pub fn metrics_router(metrics: Arc<Metrics>, state: AdminState) -> Router {
    Router::new()
        .route("/metrics", get(move || async move { metrics_page(&metrics) }))
        .merge(Router::new().route("/healthz", get(healthz)).with_state(state))
}

fn metrics_page(metrics: &Metrics) -> Response {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match metrics.encode() {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

/// 503 while the configuration cannot be read: what is served then may be out of date.
async fn healthz(State(state): State<AdminState>) -> Response {
    match &state.report.load().directory {
        None => "ok\n".into_response(),
        Some(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    }
}

async fn snapshot(State(state): State<AdminState>) -> Json<serde_json::Value> {
    Json(json::snapshot(&state.current.load()))
}

async fn report(State(state): State<AdminState>) -> Response {
    let report = state.report.load_full();
    Json(serde_json::json!(*report)).into_response()
}
