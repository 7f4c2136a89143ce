"""The words of SQL that the walker knows: node names to statement kinds, and functions and fields of which it has an opinion."""

from __future__ import annotations

from typing import Final

KINDS: Final = {
    "SelectStmt": "SELECT",
    "InsertStmt": "INSERT",
    "UpdateStmt": "UPDATE",
    "DeleteStmt": "DELETE",
    "MergeStmt": "MERGE",
    "TruncateStmt": "TRUNCATE",
    "CopyStmt": "COPY",
    "ExplainStmt": "EXPLAIN",
    "PrepareStmt": "PREPARE",
    "ExecuteStmt": "EXECUTE",
    "DeallocateStmt": "DEALLOCATE",
    "DoStmt": "DO",
    "CallStmt": "CALL",
    "LockStmt": "LOCK",
    "ListenStmt": "LISTEN",
    "UnlistenStmt": "UNLISTEN",
    "NotifyStmt": "NOTIFY",
    "DiscardStmt": "DISCARD",
    "VariableShowStmt": "SHOW",
    "FetchStmt": "FETCH",
    "DeclareCursorStmt": "DECLARE",
    "ClosePortalStmt": "CLOSE",
    "RenameStmt": "ALTER",
    "IndexStmt": "CREATE",
    "ViewStmt": "CREATE",
    "DefineStmt": "CREATE",
    "CompositeTypeStmt": "CREATE",
    "RuleStmt": "CREATE",
    "CommentStmt": "COMMENT",
    "ClusterStmt": "CLUSTER",
    "ReindexStmt": "REINDEX",
    "RefreshMatViewStmt": "REFRESH",
    "ReassignOwnedStmt": "REASSIGN",
    "LoadStmt": "LOAD",
    "CheckPointStmt": "CHECKPOINT",
    "SecLabelStmt": "SECURITY LABEL",
    "ImportForeignSchemaStmt": "IMPORT",
}
DDL: Final = frozenset({"CREATE", "ALTER", "DROP", "COMMENT", "IMPORT", "REFRESH", "REASSIGN"})
OPAQUE: Final = frozenset({"DO", "CALL", "LOAD"})
TRANSACTION: Final = (
    "TRANSACTION",
    "BEGIN",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "SAVEPOINT",
    "RELEASE",
    "ROLLBACK",
    "PREPARE TRANSACTION",
    "COMMIT",
    "ROLLBACK",
)
"""By TransactionStmtKind."""
STATEMENT_KINDS: Final = frozenset(
    {
        *KINDS.values(),
        *TRANSACTION,
        "DROP",
        "ALTER",
        "CREATE",
        "SET",
        "VACUUM",
        "ANALYZE",
        "GRANT",
        "REVOKE",
        "CONSTRAINTSSET",
    }
)
"""Every word that `statement` may ask for."""
LOOK_AT_NO_ROW: Final = frozenset(
    {"VariableSetStmt", "VariableShowStmt", "DropStmt", "DropRoleStmt", "DropdbStmt", "DropOwnedStmt",
     "DropTableSpaceStmt", "DropSubscriptionStmt", "DropUserMappingStmt", "CommentStmt", "GrantStmt", "GrantRoleStmt",
     "CreateStmt", "CreateSeqStmt", "AlterSeqStmt", "CreateRoleStmt", "AlterRoleStmt", "AlterRoleSetStmt", "CreateEnumStmt",
     "AlterEnumStmt", "CompositeTypeStmt", "CreateDomainStmt", "CreateStatsStmt", "CreatePolicyStmt", "AlterPolicyStmt",
     "AlterOwnerStmt", "AlterObjectSchemaStmt", "AlterObjectDependsStmt", "AlterDefaultPrivilegesStmt", "CreateTrigStmt",
     "CreateEventTrigStmt", "AlterEventTrigStmt", "CreateFunctionStmt", "AlterFunctionStmt", "CreateCastStmt",
     "CreateConversionStmt", "CreateOpClassStmt", "CreateOpFamilyStmt", "AlterOpFamilyStmt", "AlterOperatorStmt",
     "AlterTypeStmt", "CreatePLangStmt", "CreateTransformStmt", "CreateExtensionStmt", "AlterExtensionStmt",
     "AlterExtensionContentsStmt", "CreateFdwStmt", "AlterFdwStmt", "CreateForeignServerStmt", "AlterForeignServerStmt",
     "CreateUserMappingStmt", "AlterUserMappingStmt", "CreateForeignTableStmt", "CreateAmStmt", "CreateRangeStmt",
     "CreateTableSpaceStmt", "AlterTableSpaceOptionsStmt", "CreatedbStmt", "AlterDatabaseStmt", "AlterDatabaseSetStmt",
     "CreatePublicationStmt", "AlterPublicationStmt", "CreateSubscriptionStmt", "AlterSubscriptionStmt", "DefineStmt",
     "ViewStmt", "RuleStmt", "RenameStmt", "SecLabelStmt", "ListenStmt", "UnlistenStmt", "LockStmt", "DiscardStmt",
     "DeallocateStmt", "PrepareStmt", "ClosePortalStmt", "CheckPointStmt", "ReassignOwnedStmt"}
)  # fmt: skip
"""Nodes of statements that look at no row of a table. Not among them: ALTER TABLE, CREATE INDEX and whatever checks rows."""
ONLY_WRITTEN: Final = frozenset(
    {"InsertStmt", "UpdateStmt", "DeleteStmt", "MergeStmt", "TruncateStmt", "CreateStmt", "AlterTableStmt"}
)
"""Their `relation` is written, not read."""
TABLE_BY_NAME: Final = frozenset(
    {
        "query_to_xml",
        "table_to_xml",
        "schema_to_xml",
        "database_to_xml",
        "query_to_xml_and_xmlschema",
        "table_to_xml_and_xmlschema",
        "schema_to_xml_and_xmlschema",
        "database_to_xml_and_xmlschema",
        "cursor_to_xml",
        "dblink",
        "dblink_exec",
        "pg_read_file",
        "pg_read_binary_file",
        "lo_export",
        "lo_import",
        "ts_stat",
        "ts_rewrite",
        "pg_logical_slot_get_changes",
        "pg_logical_slot_peek_changes",
        "pg_logical_slot_get_binary_changes",
        "pg_logical_slot_peek_binary_changes",
    }
)
ROW_FUNCTIONS: Final = frozenset(
    {
        "row_to_json", "to_json", "to_jsonb", "json_agg", "jsonb_agg", "json_build_array", "jsonb_build_array", "array_agg",
        "concat", "record_out", "record_send", "quote_literal", "quote_nullable", "hstore", "xmlagg", "any_value", "max", "min",
    }
)  # fmt: skip
"""May be called as if they were columns of a row: `c.to_json`."""
MOVING: Final = frozenset({"INSERT", "UPDATE", "MERGE", "COPY", "CREATE", "ALTER"})
"""Kinds that may put a value where another may read it."""
SINKS: Final = frozenset(
    {
        "pg_notify", "set_config", "lo_from_bytea", "lo_put", "lowrite", "pg_logical_emit_message", "pg_file_write",
        "dblink_send_query", "dblink_open", "dblink_connect",
        "setval", "setseed", "lo_create", "lo_creat", "lo_open", "lo_truncate", "lo_truncate64", "lo_lseek", "lo_lseek64",
        "pg_advisory_lock", "pg_advisory_lock_shared", "pg_advisory_xact_lock", "pg_advisory_xact_lock_shared",
        "pg_try_advisory_lock", "pg_try_advisory_lock_shared", "pg_try_advisory_xact_lock", "pg_try_advisory_xact_lock_shared",
        "pg_create_physical_replication_slot", "pg_create_logical_replication_slot", "pg_copy_physical_replication_slot",
        "pg_copy_logical_replication_slot", "pg_replication_slot_advance", "pg_replication_origin_create",
        "pg_replication_origin_advance", "pg_replication_origin_session_setup", "pg_replication_origin_xact_setup",
        "pg_create_restore_point", "pg_backup_start", "pg_start_backup", "pg_extension_config_dump", "pg_cancel_backend",
        "pg_terminate_backend", "pg_log_backend_memory_contexts", "pg_sleep", "pg_sleep_for", "pg_sleep_until",
        "pg_set_relation_stats", "pg_set_attribute_stats", "pg_restore_relation_stats", "pg_restore_attribute_stats",
    }
)  # fmt: skip
"""Functions that put their arguments where no mask reaches: a setting, a sequence, a lock, an object's name, a log, a time."""
SET_RETURNING: Final = frozenset(
    {
        "generate_series", "generate_subscripts", "unnest", "regexp_matches", "regexp_split_to_table", "string_to_table",
        "json_each", "json_each_text", "jsonb_each", "jsonb_each_text", "json_array_elements", "json_array_elements_text",
        "jsonb_array_elements", "jsonb_array_elements_text", "json_object_keys", "jsonb_object_keys", "json_populate_recordset",
        "jsonb_populate_recordset", "json_to_recordset", "jsonb_to_recordset", "jsonb_path_query", "jsonb_path_query_tz",
        "ts_parse", "ts_debug", "ts_stat", "aclexplode", "pg_options_to_table",
    }
)  # fmt: skip
"""How many rows they make depends on their arguments."""
COMPARES: Final = frozenset({"A_Expr", "FuncCall", "NullTest", "CaseExpr", "CoalesceExpr", "MinMaxExpr"})
DEFINED: Final = ("into_clause", "into", "view", "relation", "rel", "table")
"""Fields that name what a statement defines or changes."""
MERGE_KINDS: Final = {3: "UPDATE", 4: "INSERT", 5: "DELETE"}
NOT_FLOWING: Final = frozenset(
    {
        "where_clause",
        "group_clause",
        "sort_clause",
        "having_clause",
        "quals",
        "join_using",
        "limit_count",
        "limit_offset",
        "distinct_clause",
    }
)
"""Parts whose columns decide about rows and do not become values of the result."""
