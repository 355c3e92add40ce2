//! The statements of stores in databases, and a transaction that makes them.
//!
//! Owns: tables, SQL, how rows are read from columns; what differs between two databases is an argument. Does not know:
//! connections and how they fail.
//!
//! Two kinds of database are spoken to, which sqlx's macros cannot check in one crate at compile time; a test prepares each statement
//! on both instead.

/// The columns of a job, in the order in which [`sql_transaction`] reads them.
macro_rules! columns {
    () => {
        "tale_jobs.seq, tale_jobs.id, tale_jobs.owner, tale_jobs.priority, tale_jobs.model, tale_jobs.spec, \
         tale_jobs.cost_seconds, tale_jobs.state, tale_jobs.node, tale_jobs.result, tale_jobs.file_bytes, tale_jobs.code, \
         tale_jobs.message, tale_jobs.created, tale_jobs.started, tale_jobs.ended_wall, tale_jobs.ended, tale_jobs.deadline, \
         tale_jobs.patience, tale_jobs.run_at, tale_jobs.is_deferred, tale_jobs.attempts, tale_jobs.crashes, \
         tale_jobs.progress, tale_jobs.change, tale_jobs.checkpoint, tale_jobs.is_cancelled, tale_jobs.epoch, \
         tale_jobs.lease_until, tale_jobs.charged, tale_jobs.idempotency_key, tale_jobs.request_hash, tale_jobs.webhook"
    };
}

/// The statements for a database. `seq`: a column that counts rows by itself. `hold` and `skip`: what makes a row that is read one's
/// own until the end, waiting for whoever has it or leaving it to them; `skip_message` is the latter for messages. `models`: the rows of a list in JSON, which is the
/// statement's second argument.
macro_rules! statements {
    (seq: $seq:literal, hold: $hold:literal, skip: $skip:literal, skip_message: $skip_message:literal,
     models: $models:literal) => {
        /// What makes each version of the tables of the one before. Only ever added to.
        pub const MIGRATIONS: &[&str] = &[concat!(
            "create table tale_jobs (seq ", $seq, ", id text not null unique, kind text not null, owner text not null, \
             priority text not null, model text not null, spec text not null, cost_seconds double precision not null, \
             charge bigint not null, state text not null, node text, result text, file_bytes bigint, code text, message text, \
             created bigint not null, started bigint, ended_wall bigint, ended bigint, deadline bigint, patience bigint, \
             run_at bigint not null, is_deferred boolean not null, attempts bigint not null, crashes bigint not null, \
             progress text, change bigint not null, checkpoint text, is_cancelled boolean not null, epoch bigint not null, \
             lease_until bigint, charged bigint not null, idempotency_key text, request_hash text, webhook text);\n\
             create unique index tale_jobs_ordered on tale_jobs (owner, idempotency_key);\n\
             create index tale_jobs_active on tale_jobs (owner, priority, seq) where state in ('queued', 'in_progress');\n\
             create index tale_jobs_ended on tale_jobs (ended) where ended is not null;\n\
             create index tale_jobs_of_owner on tale_jobs (owner, seq);\n\
             create table tale_flows (owner text not null, priority text not null, virtual_time bigint not null, \
             primary key (owner, priority));\n\
             create table tale_turns (model text primary key, virtual_time bigint not null);\n\
             create table tale_messages (id text primary key, url text not null, job text not null, state text not null, \
             ended bigint not null, attempts bigint not null, due bigint not null);\n\
             create index tale_messages_due on tale_messages (due);\n\
             create table tale_touches (id bigint primary key, touched bigint not null);"
        )];

        pub const VERSIONS_TABLE: &str =
            "create table if not exists tale_schema (version bigint primary key, checksum text not null)";
        pub const VERSIONS: &str = "select version, checksum from tale_schema order by version";
        pub const ADD_VERSION: &str = "insert into tale_schema (version, checksum) values ($1, $2)";

        pub const LOOK: &str = concat!("select ", columns!(), " from tale_jobs where id = $1");
        pub const HOLD: &str = concat!("select ", columns!(), " from tale_jobs where id = $1", $hold);
        pub const ORDERED: &str =
            concat!("select ", columns!(), " from tale_jobs where owner = $1 and idempotency_key = $2");
        pub const NUM_ACTIVE: &str = "select count(*), count(*) filter (where owner = $1) from tale_jobs \
             where state in ('queued', 'in_progress')";
        pub const INSERT: &str = "insert into tale_jobs (id, kind, owner, priority, model, spec, cost_seconds, charge, state, \
             created, deadline, patience, run_at, is_deferred, attempts, crashes, change, is_cancelled, epoch, charged, \
             idempotency_key, request_hash, webhook) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, \
             $16, $17, $18, $19, $20, $21, $22, $23) returning seq";
        pub const UPDATE: &str = "update tale_jobs set priority = $2, charge = $3, state = $4, node = $5, result = $6, \
             file_bytes = $7, code = $8, message = $9, started = $10, ended_wall = $11, ended = $12, deadline = $13, \
             run_at = $14, is_deferred = $15, attempts = $16, crashes = $17, progress = $18, change = $19, checkpoint = $20, \
             is_cancelled = $21, epoch = $22, lease_until = $23, charged = $24 where seq = $1";
        pub const DELETE: &str = "delete from tale_jobs where id = $1";
        // A flow may be forgotten in the moment in which a job of it comes.
        pub const NEXT: &str = concat!(
            "select ", columns!(), " from tale_jobs left join tale_flows \
             on tale_flows.owner = tale_jobs.owner and tale_flows.priority = tale_jobs.priority \
             where tale_jobs.state = 'queued' and run_at <= $1 and (deadline is null or deadline > $1) \
             and crashes < $3 and model in (", $models, ") \
             order by coalesce(virtual_time, 0), seq limit 1", $skip
        );
        pub const LAPSED: &str = concat!(
            "select ", columns!(), " from tale_jobs where state in ('queued', 'in_progress') \
             and (deadline <= $1 or lease_until <= $1) order by seq", $skip
        );
        pub const ENDED: &str = "select seq, ended, coalesce(file_bytes, 0) from tale_jobs where ended is not null";
        pub const TAKE_ENDED: &str =
            concat!("delete from tale_jobs where seq = $1 and ended is not null returning ", columns!());
        pub const PLACE: &str = "select seq from tale_jobs where id = $1";
        pub const PAGE_UP: &str = concat!(
            "select ", columns!(), " from tale_jobs where seq > $1 and (cast($2 as text) is null or owner = $2) \
             and (cast($3 as text) is null or kind = $3) and (cast($4 as text) is null or state = $4) and (cast($5 as text) is null or model = $5) \
             order by seq limit $6"
        );
        pub const PAGE_DOWN: &str = concat!(
            "select ", columns!(), " from tale_jobs where seq < $1 and (cast($2 as text) is null or owner = $2) \
             and (cast($3 as text) is null or kind = $3) and (cast($4 as text) is null or state = $4) and (cast($5 as text) is null or model = $5) \
             order by seq desc limit $6"
        );
        pub const QUEUE: &str = concat!(
            "with waiting as (select tale_jobs.seq as place, coalesce(virtual_time, 0) - charge + sum(charge) over \
             (partition by tale_jobs.owner, tale_jobs.priority order by tale_jobs.seq) as turn \
             from tale_jobs left join tale_flows \
             on tale_flows.owner = tale_jobs.owner and tale_flows.priority = tale_jobs.priority \
             where tale_jobs.state = 'queued' and run_at <= $1) \
             select ", columns!(), " from tale_jobs left join waiting on waiting.place = tale_jobs.seq \
             where state in ('queued', 'in_progress') \
             order by case when state = 'in_progress' then 0 when run_at <= $1 then 1 else 2 end, \
             case when state = 'queued' and run_at > $1 then run_at end, turn, seq limit $2"
        );
        pub const TIME: &str =
            concat!("select virtual_time from tale_flows where owner = $1 and priority = $2", $hold);
        pub const SET_TIME: &str = "insert into tale_flows (owner, priority, virtual_time) values ($1, $2, $3) \
             on conflict (owner, priority) do update set virtual_time = excluded.virtual_time";
        pub const NUM_AWAKE: &str = "select count(*) from tale_jobs where owner = $1 and priority = $2 \
             and state in ('queued', 'in_progress') and (state = 'in_progress' or not is_deferred)";
        pub const TURN: &str = "select virtual_time from tale_turns where model = $1";
        pub const SET_TURN: &str = "insert into tale_turns (model, virtual_time) values ($1, $2) \
             on conflict (model) do update set virtual_time = excluded.virtual_time";
        pub const FORGET_FLOWS: &str = "delete from tale_flows \
             where virtual_time <= (select max(virtual_time) from tale_turns) and not exists (select 1 from tale_jobs \
             where tale_jobs.owner = tale_flows.owner and tale_jobs.priority = tale_flows.priority)";
        pub const FORGET_TURNS: &str = "delete from tale_turns where not exists (select 1 from tale_flows) \
             and not exists (select 1 from tale_jobs where tale_jobs.model = tale_turns.model)";
        pub const POST: &str = "insert into tale_messages (id, url, job, state, ended, attempts, due) \
             values ($1, $2, $3, $4, $5, $6, $7)";
        pub const DUE: &str = concat!(
            "select id, url, job, state, ended, attempts from tale_messages where due <= $1 order by due, id limit $2",
            $skip_message
        );
        pub const TRY_MESSAGE: &str = "update tale_messages set attempts = attempts + 1, due = $2 where id = $1";
        pub const DELAY_MESSAGE: &str = "update tale_messages set due = $2 where id = $1";
        pub const DROP_MESSAGE: &str = "delete from tale_messages where id = $1";
        pub const TOUCH: &str = "insert into tale_touches (id, touched) values (1, $1) \
             on conflict (id) do update set touched = excluded.touched";

        /// All that jobs are worked on with.
        #[cfg(test)]
        pub const ALL: &[&str] = &[
            VERSIONS_TABLE, VERSIONS, ADD_VERSION, LOOK, HOLD, ORDERED, NUM_ACTIVE, INSERT, UPDATE, DELETE, NEXT, LAPSED, ENDED,
            TAKE_ENDED, PLACE, PAGE_UP, PAGE_DOWN, QUEUE, TIME, SET_TIME, NUM_AWAKE, TURN, SET_TURN, FORGET_FLOWS,
            FORGET_TURNS, POST, DUE, TRY_MESSAGE, DELAY_MESSAGE, DROP_MESSAGE, TOUCH,
        ];
    };
}

/// Makes a type `$name` with a `connection: &mut $connection` the transaction over [`statements`] that are in scope as `sql`. Beside it
/// there have to be methods of the type: `time_now`, `lock_places`, `tell`, and a function `failure` for errors of sqlx.
macro_rules! sql_transaction {
    ($name:ident, $database:ty, $row:ty) => {
        impl $name<'_> {
            async fn all(
                &mut self,
                query: sqlx::query::Query<'_, $database, <$database as sqlx::Database>::Arguments>,
            ) -> Result<Vec<$row>, StoreError> {
                query.fetch_all(&mut *self.connection).await.map_err(failure)
            }

            async fn one(
                &mut self,
                query: sqlx::query::Query<'_, $database, <$database as sqlx::Database>::Arguments>,
            ) -> Result<Option<$row>, StoreError> {
                query.fetch_optional(&mut *self.connection).await.map_err(failure)
            }

            async fn do_it(
                &mut self,
                query: sqlx::query::Query<'_, $database, <$database as sqlx::Database>::Arguments>,
            ) -> Result<(), StoreError> {
                query.execute(&mut *self.connection).await.map(|_| ()).map_err(failure)
            }

            /// Brings the tables to the newest version that is known.
            pub async fn migrate(&mut self) -> Result<(), StoreError> {
                self.do_it(sqlx::query(sql::VERSIONS_TABLE)).await?;
                let known = sql::MIGRATIONS;
                let mut version = 0;
                for row in self.all(sqlx::query(sql::VERSIONS)).await? {
                    let found: i64 = column(&row, 0)?;
                    let checksum: String = column(&row, 1)?;
                    let known_at = usize::try_from(found - 1).ok().and_then(|at| known.get(at));
                    let Some(text) = known_at else {
                        return Err(StoreError::NewerSchema { found, known: known.len() as i64 });
                    };
                    if checksum != $crate::job::store::sql::checksum(text) {
                        return Err(StoreError::Damaged(format!("version {found} of its schema is another one")));
                    }
                    version = version.max(found as usize);
                }
                for (index, text) in known.iter().enumerate().skip(version) {
                    let made = sqlx::raw_sql(*text).execute(&mut *self.connection).await;
                    made.map_err(failure)?;
                    let checksum = $crate::job::store::sql::checksum(text);
                    self.do_it(sqlx::query(sql::ADD_VERSION).bind(index as i64 + 1).bind(checksum)).await?;
                }
                Ok(())
            }
        }

        /// A value of a row.
        fn column<'r, T>(row: &'r $row, index: usize) -> Result<T, StoreError>
        where
            T: sqlx::Decode<'r, $database> + sqlx::Type<$database>,
        {
            sqlx::Row::try_get(row, index).map_err(|error| StoreError::Damaged(error.to_string()))
        }

        /// A job of a row with [`columns`].
        fn job(row: $row) -> Result<Row, StoreError> {
            let row = &row;
            let state: String = column(row, 7)?;
            let state = $crate::job::store::sql::state(
                &state,
                [column(row, 8)?, column(row, 9)?, column(row, 11)?, column(row, 12)?],
                column(row, 10)?,
            )?;
            let key: Option<String> = column(row, 30)?;
            let hash: Option<String> = column(row, 31)?;
            let idempotency = match (key, hash) {
                (Some(key), Some(hash)) => {
                    Some(Idempotency { key, request_hash: $crate::job::store::sql::hash_of(&hash)? })
                }
                _ => None,
            };
            let deadline: Option<i64> = column(row, 17)?;
            let record = JobRecord {
                id: $crate::job::store::sql::id_of(&column::<String>(row, 1)?)?,
                owner: column(row, 2)?,
                priority: $crate::job::store::sql::priority_of(&column::<String>(row, 3)?)?,
                model: column(row, 4)?,
                spec: column(row, 5)?,
                cost_seconds: column(row, 6)?,
                state,
                created: system_time(column(row, 13)?),
                started: column::<Option<i64>>(row, 14)?.map(system_time),
                ended: column::<Option<i64>>(row, 15)?.map(system_time),
                deadline: deadline.map(system_time),
                attempts: column::<i64>(row, 21)? as u32,
                crashes: column::<i64>(row, 22)? as u32,
                progress: column(row, 23)?,
                change: column::<i64>(row, 24)? as u64,
                checkpoint: column(row, 25)?,
                is_cancelled: column(row, 26)?,
            };
            Ok(Row {
                seq: column(row, 0)?,
                record,
                epoch: column::<i64>(row, 27)? as u64,
                lease_until: column(row, 28)?,
                run_at: column(row, 19)?,
                is_deferred: column(row, 20)?,
                deadline,
                patience: column(row, 18)?,
                charged: column(row, 29)?,
                ended: column(row, 16)?,
                idempotency,
                webhook: column(row, 32)?,
            })
        }

        #[async_trait]
        impl Transaction for $name<'_> {
            async fn now(&mut self) -> Result<Moment, StoreError> {
                if let Some(now) = self.now {
                    return Ok(now);
                }
                let now = self.time_now().await?;
                self.now = Some(now);
                Ok(now)
            }

            async fn hold_places(&mut self) -> Result<(), StoreError> {
                self.lock_places().await
            }

            async fn num_active(&mut self, owner: &str) -> Result<(usize, usize), StoreError> {
                let row = self.one(sqlx::query(sql::NUM_ACTIVE).bind(owner)).await?;
                let row = row.ok_or_else(|| StoreError::Damaged("a count has no row".to_owned()))?;
                Ok((column::<i64>(&row, 0)? as usize, column::<i64>(&row, 1)? as usize))
            }

            async fn look(&mut self, id: JobId) -> Result<Option<Row>, StoreError> {
                self.one(sqlx::query(sql::LOOK).bind(id.to_string())).await?.map(job).transpose()
            }

            async fn hold(&mut self, id: JobId) -> Result<Option<Row>, StoreError> {
                self.one(sqlx::query(sql::HOLD).bind(id.to_string())).await?.map(job).transpose()
            }

            async fn ordered(&mut self, owner: &str, key: &str) -> Result<Option<Row>, StoreError> {
                self.one(sqlx::query(sql::ORDERED).bind(owner).bind(key)).await?.map(job).transpose()
            }

            async fn insert(&mut self, row: &mut Row) -> Result<(), StoreError> {
                let record = &row.record;
                let hash = row.idempotency.as_ref().map(|known| $crate::job::store::sql::hex(&known.request_hash));
                let query = sqlx::query(sql::INSERT)
                    .bind(record.id.to_string())
                    .bind(record.id.kind().as_str())
                    .bind(&record.owner)
                    .bind(record.priority.as_str())
                    .bind(&record.model)
                    .bind(&record.spec)
                    .bind(record.cost_seconds)
                    .bind(row.charge())
                    .bind(record.state.as_str())
                    .bind(since_1970(record.created))
                    .bind(row.deadline)
                    .bind(row.patience)
                    .bind(row.run_at)
                    .bind(row.is_deferred)
                    .bind(i64::from(record.attempts))
                    .bind(i64::from(record.crashes))
                    .bind(record.change as i64)
                    .bind(record.is_cancelled)
                    .bind(row.epoch as i64)
                    .bind(row.charged)
                    .bind(row.idempotency.as_ref().map(|known| known.key.as_str()))
                    .bind(hash)
                    .bind(row.webhook.as_deref());
                let inserted = self.one(query).await?;
                let inserted = inserted.ok_or_else(|| StoreError::Damaged("a job was not added".to_owned()))?;
                row.seq = column(&inserted, 0)?;
                Ok(())
            }

            async fn update(&mut self, row: &Row) -> Result<(), StoreError> {
                let record = &row.record;
                let [node, result, code, message] = $crate::job::store::sql::texts(&record.state);
                let query = sqlx::query(sql::UPDATE)
                    .bind(row.seq)
                    .bind(record.priority.as_str())
                    .bind(row.charge())
                    .bind(record.state.as_str())
                    .bind(node)
                    .bind(result)
                    .bind($crate::job::store::sql::file_bytes(&record.state))
                    .bind(code)
                    .bind(message)
                    .bind(record.started.map(since_1970))
                    .bind(record.ended.map(since_1970))
                    .bind(row.ended)
                    .bind(row.deadline)
                    .bind(row.run_at)
                    .bind(row.is_deferred)
                    .bind(i64::from(record.attempts))
                    .bind(i64::from(record.crashes))
                    .bind(record.progress.as_deref())
                    .bind(record.change as i64)
                    .bind(record.checkpoint.as_deref())
                    .bind(record.is_cancelled)
                    .bind(row.epoch as i64)
                    .bind(row.lease_until)
                    .bind(row.charged);
                self.do_it(query).await
            }

            async fn delete(&mut self, id: JobId) -> Result<(), StoreError> {
                self.do_it(sqlx::query(sql::DELETE).bind(id.to_string())).await
            }

            async fn next(&mut self, claimer: &Claimer) -> Result<Option<Row>, StoreError> {
                let now = self.now().await?.steady;
                let models = $crate::job::store::sql::list(&claimer.models);
                let crashes = if claimer.is_free { i64::MAX } else { i64::from(CRASHES_ALONE) };
                let query = sqlx::query(sql::NEXT).bind(now).bind(models).bind(crashes);
                self.one(query).await?.map(job).transpose()
            }

            async fn lapsed(&mut self) -> Result<Vec<Row>, StoreError> {
                let now = self.now().await?.steady;
                let rows = self.all(sqlx::query(sql::LAPSED).bind(now)).await?;
                let mut rows = rows.into_iter().map(job).collect::<Result<Vec<_>, _>>()?;
                rows.sort_by_key(|row| (FlowName::of(row), row.seq));
                Ok(rows)
            }

            async fn ended(&mut self) -> Result<Vec<Ended>, StoreError> {
                let rows = self.all(sqlx::query(sql::ENDED)).await?;
                let ended = rows.iter().map(|row| {
                    let file_bytes = column::<i64>(row, 2)? as u64;
                    Ok(Ended { seq: column(row, 0)?, ended: column(row, 1)?, file_bytes })
                });
                ended.collect()
            }

            async fn take_ended(&mut self, seq: i64) -> Result<Option<Row>, StoreError> {
                self.one(sqlx::query(sql::TAKE_ENDED).bind(seq)).await?.map(job).transpose()
            }

            async fn page(&mut self, filter: &Filter, page: &Page) -> Result<Option<Listing>, StoreError> {
                let (statement, first) = match page.order {
                    Order::Ascending => (sql::PAGE_UP, i64::MIN),
                    Order::Descending => (sql::PAGE_DOWN, i64::MAX),
                };
                let after = match page.after {
                    None => first,
                    Some(id) => match self.one(sqlx::query(sql::PLACE).bind(id.to_string())).await? {
                        None => return Ok(None),
                        Some(row) => column(&row, 0)?,
                    },
                };
                let limit = i64::try_from(page.limit).unwrap_or(i64::MAX).saturating_add(1);
                let query = sqlx::query(statement)
                    .bind(after)
                    .bind(filter.owner.as_deref())
                    .bind(filter.kind.map($crate::job::JobKind::as_str))
                    .bind(filter.state)
                    .bind(filter.model.as_deref())
                    .bind(limit);
                let rows = self.all(query).await?;
                let has_more = rows.len() > page.limit;
                let rows = rows.into_iter().take(page.limit).map(|row| job(row).map(|row| row.record));
                Ok(Some(Listing { jobs: rows.collect::<Result<_, _>>()?, has_more }))
            }

            async fn queue(&mut self, limit: usize) -> Result<Vec<Row>, StoreError> {
                let now = self.now().await?.steady;
                let limit = i64::try_from(limit).unwrap_or(i64::MAX);
                let rows = self.all(sqlx::query(sql::QUEUE).bind(now).bind(limit)).await?;
                rows.into_iter().map(job).collect()
            }

            async fn time(&mut self, flow: &FlowName) -> Result<Option<i64>, StoreError> {
                let query = sqlx::query(sql::TIME).bind(flow.owner.as_str()).bind(flow.priority.as_str());
                self.one(query).await?.map(|row| column(&row, 0)).transpose()
            }

            async fn set_time(&mut self, flow: &FlowName, time: i64) -> Result<(), StoreError> {
                let query =
                    sqlx::query(sql::SET_TIME).bind(flow.owner.as_str()).bind(flow.priority.as_str()).bind(time);
                self.do_it(query).await
            }

            async fn is_awake(&mut self, flow: &FlowName) -> Result<bool, StoreError> {
                let query = sqlx::query(sql::NUM_AWAKE).bind(flow.owner.as_str()).bind(flow.priority.as_str());
                let num: Option<i64> = self.one(query).await?.map(|row| column(&row, 0)).transpose()?;
                Ok(num.unwrap_or(0) > 0)
            }

            async fn turn(&mut self, model: &str) -> Result<Option<i64>, StoreError> {
                self.one(sqlx::query(sql::TURN).bind(model)).await?.map(|row| column(&row, 0)).transpose()
            }

            async fn set_turn(&mut self, model: &str, turn: i64) -> Result<(), StoreError> {
                self.do_it(sqlx::query(sql::SET_TURN).bind(model).bind(turn)).await
            }

            async fn forget_flows(&mut self) -> Result<(), StoreError> {
                self.do_it(sqlx::query(sql::FORGET_FLOWS)).await?;
                self.do_it(sqlx::query(sql::FORGET_TURNS)).await
            }

            async fn post(&mut self, message: &Message) -> Result<(), StoreError> {
                let now = self.now().await?.steady;
                let query = sqlx::query(sql::POST)
                    .bind(message.id.as_str())
                    .bind(message.url.as_str())
                    .bind(message.job.to_string())
                    .bind(message.state.as_str())
                    .bind(since_1970(message.ended))
                    .bind(i64::from(message.attempts))
                    .bind(now);
                self.do_it(query).await
            }

            async fn due(&mut self, limit: usize, lease: Duration) -> Result<Vec<Message>, StoreError> {
                let now = self.now().await?.steady;
                let limit = i64::try_from(limit).unwrap_or(i64::MAX);
                let mut due = Vec::new();
                for row in self.all(sqlx::query(sql::DUE).bind(now).bind(limit)).await? {
                    due.push(Message {
                        id: column(&row, 0)?,
                        url: column(&row, 1)?,
                        job: $crate::job::store::sql::id_of(&column::<String>(&row, 2)?)?,
                        state: column(&row, 3)?,
                        ended: system_time(column(&row, 4)?),
                        attempts: column::<i64>(&row, 5)? as u32,
                    });
                }
                for message in &due {
                    let until = now + micros(lease);
                    self.do_it(sqlx::query(sql::TRY_MESSAGE).bind(message.id.as_str()).bind(until)).await?;
                }
                Ok(due)
            }

            async fn settle(&mut self, message: &str, again: Option<Duration>) -> Result<(), StoreError> {
                let Some(wait) = again else {
                    return self.do_it(sqlx::query(sql::DROP_MESSAGE).bind(message)).await;
                };
                let at = self.now().await?.steady + micros(wait);
                self.do_it(sqlx::query(sql::DELAY_MESSAGE).bind(message).bind(at)).await
            }

            async fn touch(&mut self) -> Result<(), StoreError> {
                let now = self.now().await?.steady;
                self.do_it(sqlx::query(sql::TOUCH).bind(now)).await
            }

            async fn announce(&mut self) -> Result<(), StoreError> {
                self.tell().await
            }
        }
    };
}

pub(super) use {columns, sql_transaction, statements};

use super::{Priority, RecordState, StoreError};
use crate::job::JobId;

/// Of the text of a migration (FNV-1a): tells a schema that somebody has changed by hand, or a version that was never released.
pub fn checksum(text: &str) -> String {
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{hash:016x}")
}

fn damaged(what: &str, found: &str) -> StoreError {
    StoreError::Damaged(format!("{found:?} is no {what}"))
}

/// The name of a job.
pub fn id_of(text: &str) -> Result<JobId, StoreError> {
    text.parse().map_err(|_| damaged("name of a job", text))
}

/// A priority.
pub fn priority_of(text: &str) -> Result<Priority, StoreError> {
    Priority::ALL.into_iter().find(|it| it.as_str() == text).ok_or_else(|| damaged("priority", text))
}

/// The state of a job from its name, its texts (node, result, code, message) and the bytes of its files.
pub fn state(name: &str, texts: [Option<String>; 4], file_bytes: Option<i64>) -> Result<RecordState, StoreError> {
    let [node, result, code, message] = texts.map(Option::unwrap_or_default);
    match name {
        "queued" => Ok(RecordState::Queued),
        "in_progress" => Ok(RecordState::Running { node }),
        "completed" => Ok(RecordState::Completed { result, file_bytes: file_bytes.unwrap_or(0) as u64 }),
        "failed" => Ok(RecordState::Failed { code, message }),
        "cancelled" => Ok(RecordState::Cancelled),
        other => Err(damaged("state", other)),
    }
}

/// Node, result, code and message of a state.
pub fn texts(state: &RecordState) -> [Option<&str>; 4] {
    match state {
        RecordState::Running { node } => [Some(node), None, None, None],
        RecordState::Completed { result, .. } => [None, Some(result), None, None],
        RecordState::Failed { code, message } => [None, None, Some(code), Some(message)],
        RecordState::Queued | RecordState::Cancelled => [None; 4],
    }
}

/// Bytes of the files of a state.
pub fn file_bytes(state: &RecordState) -> Option<i64> {
    match state {
        RecordState::Completed { file_bytes, .. } => Some(i64::try_from(*file_bytes).unwrap_or(i64::MAX)),
        _ => None,
    }
}

/// Bytes as text.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The hash of a request.
pub fn hash_of(text: &str) -> Result<[u8; 32], StoreError> {
    let bytes = (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2).unwrap_or(""), 16));
    let bytes = bytes.collect::<Result<Vec<_>, _>>().ok().and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or_else(|| damaged("hash", text))
}

/// A list of texts in JSON.
pub fn list(texts: &[String]) -> String {
    serde_json::Value::from(texts).to_string()
}
